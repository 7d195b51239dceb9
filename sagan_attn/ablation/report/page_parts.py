"""The style and the script of the page. They are inline, and the page's policy names their hashes."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --dim: #5c5c5c; --paper: #ffffff; --line: #d5d5d5; --soft: #f4f5f7;
  --accent: #0b5cad; --warn: #8a4b00; --warn-soft: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --dim: #a6a6a6; --paper: #16181c; --line: #3a3d44;
  --soft: #22252b; --accent: #7db9f5; --warn: #ffc066; --warn-soft: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 88rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
a { color: var(--accent); }
.verdict { font-size: 1.05rem; max-width: 75ch; border-left: 4px solid var(--accent); padding: .3rem 0 .3rem .9rem;
  margin: .8rem 0; }
.verdict b { display: block; font-size: .85rem; color: var(--dim); font-weight: 600; }
.screen { border-left-color: var(--warn); }
.stamp { display: inline-block; background: var(--warn-soft); color: var(--warn); border: 1px solid var(--warn);
  border-radius: .3rem; padding: 0 .5rem; font-size: .8rem; font-weight: 600; }
.warn { background: var(--warn-soft); color: var(--warn); border-radius: .4rem; padding: .5rem .9rem; max-width: 75ch; }
.warn p { margin: .2rem 0; }
ul.marks { color: var(--warn); max-width: 75ch; margin: .4rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; margin: .6rem 0; }
.wide.more { mask-image: linear-gradient(to left, transparent, #000 2.5rem); }
.wide.scrolls::after { content: "scroll sideways for more columns \\2192"; display: block; position: sticky; left: 0;
  padding: .3rem .6rem; color: var(--dim); font-size: .8rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  overflow-wrap: normal; }
tr:last-child td { border-bottom: 0; }
th { background: var(--soft); text-align: right; vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.words { text-align: left; white-space: normal; min-width: 9rem; }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; background: var(--paper);
  white-space: normal; min-width: 8rem; max-width: 16rem; }
th:first-child { background: var(--soft); }
.gain { font-weight: 700; }
.gain td:first-child::after { content: " \\2191"; }
.harm td:first-child::after { content: " \\2193"; }
.baseline, .control { color: var(--dim); }
.finished { color: inherit; }
.diverged, .failed, .missing { color: var(--warn); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: .8rem;
  align-items: start; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: .4rem; padding: .4rem; }
figure img { display: block; width: 100%; height: auto; }
.dim { color: var(--dim); font-size: .85rem; max-width: 80ch; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; color: var(--dim); }
summary { cursor: pointer; }
@media (max-width: 40rem) { body { padding: .6rem .7rem 2rem; font-size: 15px; }
  th:first-child, td:first-child { max-width: 7.5rem; min-width: 5.5rem; }
  th, td { padding: .3rem .4rem; } .words { min-width: 7rem; } }
@page { size: A4 landscape; margin: 10mm; }
@media print { :root { --ink: #000; --dim: #333; --paper: #fff; --line: #999; --soft: #eee; --accent: #000;
    --warn: #000; --warn-soft: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; border: 0; }
  .wide.more { mask-image: none; } .wide.scrolls::after { content: none; }
  table { font-size: 6pt; } th, td { padding: 1pt 2pt; white-space: normal; min-width: 0; }
  th:first-child, td:first-child { position: static; min-width: 0; } .words { min-width: 0; } a { color: inherit; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .figures { display: block; }
  figure { margin-bottom: 8pt; } }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // nothing stays below
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : Number(x) - Number(y);
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
for (const wide of document.querySelectorAll(".wide")) {
  const see = () => {
    wide.classList.toggle("scrolls", wide.scrollWidth > wide.clientWidth + 1);
    wide.classList.toggle("more", wide.scrollLeft + wide.clientWidth < wide.scrollWidth - 1);
  };
  wide.addEventListener("scroll", see);
  new ResizeObserver(see).observe(wide);
}
"""
