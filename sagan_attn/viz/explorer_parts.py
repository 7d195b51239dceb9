"""Style, script and controls of the explorer. They are inline, and the page's policy names their hashes."""

__all__ = ["BODY", "SCRIPT", "STYLE"]

STYLE = """
.explorer { display: grid; grid-template-columns: minmax(0, 30rem) minmax(0, 1fr); gap: 1.2rem; align-items: start; }
#map { display: block; width: 100%; touch-action: none; cursor: crosshair; border: 1px solid var(--line);
  border-radius: .3rem; }
#map:focus-visible, button:focus-visible, select:focus-visible, input:focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
.bar { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem; align-items: center; margin: .5rem 0;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
#scale { width: 100%; height: .9rem; border: 1px solid var(--line); }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin-bottom: .3rem; }
select, input { font: inherit; color: inherit; background: var(--paper); accent-color: var(--accent); }
select { border: 1px solid var(--line); border-radius: .3rem; padding: .25rem .4rem; max-width: 100%; }
label { display: inline-flex; gap: .4rem; align-items: center; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
.strip button { font: inherit; font-size: .78rem; color: inherit; background: var(--soft); padding: .25rem;
  width: 5.6rem; border: 2px solid transparent; border-radius: .35rem; cursor: pointer; overflow: hidden; }
.strip button[aria-pressed=true] { border-color: var(--accent); font-weight: 600; }
.strip canvas, .strip img { display: block; width: 100%; image-rendering: pixelated; margin-bottom: .2rem; }
.strip span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#readout { min-height: 5.6em; margin: .4rem 0; font-variant-numeric: tabular-nums; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
#caption { margin: 0 0 .4rem; font-weight: 600; }
.explorer .wide { width: fit-content; max-width: 100%; }
table { width: auto; }
th[scope=row] { text-align: left; }
@media (hover: none) { .pointer { display: none; } }
@media (max-width: 48rem) { .explorer { grid-template-columns: minmax(0, 1fr); } .strip { flex-wrap: nowrap;
  overflow-x: auto; padding-bottom: .3rem; } .strip button { flex: none; width: 5rem; }
  .explorer .wide, table { width: 100%; }
  #readout { min-height: 4.4em; } }
"""

BODY = """
<p class="dim">Point at the image, touch it, or give it the focus and press arrow keys: the colours show how much weight
the attention of that place gives to every other. A click keeps the place.</p>
<noscript><p><b>This page needs JavaScript, which it brings along; nothing is fetched.</b></p></noscript>
<div class="explorer">
<div>
<p id="caption"></p>
<canvas id="map" tabindex="0" role="application" aria-roledescription="attention map"
  aria-label="Query position: arrow keys move it, Home and End go to the ends of the row, Page Up and Page Down change
  the image" aria-describedby="readout"></canvas>
<div class="bar"><span id="low"></span><canvas id="scale" width="256" height="1" role="img"
  aria-label="Colours from the smallest to the largest weight"></canvas><span id="high"></span></div>
<p id="readout"></p>
<p id="live" class="unseen" role="status"></p>
</div>
<div>
<div class="controls">
<label>site <select id="site"></select></label>
<label>opacity <input id="opacity" type="range" min="0" max="100" value="65"></label>
<label class="pointer"><input id="follow" type="checkbox" checked> follow the pointer</label>
</div>
<h2 id="heads-title">Head</h2>
<div id="heads" class="strip" role="group" aria-labelledby="heads-title"></div>
<h2 id="images-title">Image</h2>
<div id="images" class="strip" role="group" aria-labelledby="images-title"></div>
<h2>What the heads do</h2>
<div class="wide" tabindex="0" role="region" aria-label="Figures of the heads"><table id="figures"></table></div>
</div>
</div>
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const colours = bytes(data.colours);
const sites = data.sites.map((site) => ({...site, weights: bytes(site.weights),
  range: new Float32Array(bytes(site.range).buffer), n: (site.query.rows.length - 1) * (site.query.columns.length - 1),
  m: (site.key.rows.length - 1) * (site.key.columns.length - 1)}));
const state = {site: 0, image: 0, head: 0, query: 0};
const pictures = data.images.map((image) => Object.assign(new Image(), {src: image.src, alt: ""}));
const greys = new Map();  // pictures without colour, so that colours mean weights alone
const site = () => sites[state.site];
const width = (cells) => cells.columns.length - 1;
const number = (value) => Number(value.toPrecision(3)).toString();

function row(head, query) {  // weights of one query, [m]; head -1 is the mean of all
  const {weights, range, heads, n, m} = site();
  const sum = new Float32Array(m);
  const chosen = head < 0 ? [...Array(heads).keys()] : [head];
  for (const one of chosen) {
    const at = (state.image * heads + one) * n + query;
    const low = range[2 * at], step = (range[2 * at + 1] - low) / 255;
    for (let key = 0; key < m; key++) sum[key] += (low + step * weights[at * m + key]) / chosen.length;
  }
  return sum;
}

function limits(values) {
  return [Math.min(0, ...values), Math.max(...values)];
}

function colour(value, low, high) {
  const place = 3 * Math.round(255 * Math.min(1, Math.max(0, high > low ? (value - low) / (high - low) : 0)));
  return `rgb(${colours[place]}, ${colours[place + 1]}, ${colours[place + 2]})`;
}

function paint(canvas, values, opacity, marked) {
  const [high, wide] = data.size, context = canvas.getContext("2d");
  const side = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
  canvas.width = side;
  canvas.height = Math.round(side * high / wide);
  const scale = side / wide, picture = pictures[state.image];
  context.imageSmoothingEnabled = false;
  if (picture.complete && picture.naturalWidth)
    context.drawImage(opacity > 0 ? grey(picture) : picture, 0, 0, canvas.width, canvas.height);
  const {rows, columns} = site().key, [low, top] = limits(values);
  context.globalAlpha = opacity;
  const edge = (at) => Math.round(at * scale);
  for (let r = 0; r + 1 < rows.length; r++) for (let c = 0; c + 1 < columns.length; c++) {
    context.fillStyle = colour(values[r * width(site().key) + c], low, top);
    context.fillRect(edge(columns[c]), edge(rows[r]), edge(columns[c + 1]) - edge(columns[c]),
      edge(rows[r + 1]) - edge(rows[r]));
  }
  context.globalAlpha = 1;
  const [x, y, right, bottom] = box(state.query).map((at) => at * scale);
  for (const [ink, line] of [["#fff", marked ? 5 : 3], ["#000", marked ? 2 : 1]]) {
    context.strokeStyle = ink;
    context.lineWidth = line * (marked ? window.devicePixelRatio || 1 : 1);
    context.strokeRect(x, y, right - x, bottom - y);
    if (!marked) continue;
    const [cx, cy, arm] = [(x + right) / 2, (y + bottom) / 2, Math.max(4, Math.min(right - x, bottom - y) / 4)];
    context.beginPath();
    for (const sign of [1, -1]) {
      context.moveTo(cx - arm, cy - sign * arm);
      context.lineTo(cx + arm, cy + sign * arm);
    }
    context.stroke();
  }
}

function grey(picture) {
  if (greys.has(picture)) return greys.get(picture);
  const made = Object.assign(document.createElement("canvas"),
    {width: picture.naturalWidth, height: picture.naturalHeight});
  const context = made.getContext("2d");
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, made.width, made.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const [red, green, blue] = pixels.data.subarray(at, at + 3);
    pixels.data.fill((red + green + blue) / 3, at, at + 3);
  }
  context.putImageData(pixels, 0, 0);
  greys.set(picture, made);
  return made;
}

function box(query) {  // left, top, right, bottom in pixels of the image
  const {rows, columns} = site().query, across = width(site().query);
  const r = Math.floor(query / across), c = query % across;
  return [columns[c], rows[r], columns[c + 1], rows[r + 1]];
}

let told = 0;
function words(values) {
  const {query, key, m} = site(), across = width(query);
  const best = values.indexOf(Math.max(...values));
  const [left, top, right, bottom] = box(state.query).map(number);
  const parts = [`Query: row ${Math.floor(state.query / across)}, column ${state.query % across}` +
    ` (x ${left} to ${right}, y ${top} to ${bottom} pixels).`,
    `Most weight: ${number(values[best])}, on row ${Math.floor(best / width(key))}, column ${best % width(key)}.`];
  const total = values.reduce((sum, value) => sum + value, 0);
  if (values.every((value) => value >= 0) && Math.abs(total - 1) < 0.05 && m > 1) {
    const entropy = values.reduce((sum, value) => value > 0 ? sum - value / total * Math.log(value / total) : sum, 0);
    parts.push(`Entropy: ${number(entropy)} of at most ${number(Math.log(m))} nats.`);
  }
  return parts.join(" ");
}

function draw() {
  const values = row(state.head, state.query), [low, high] = limits(values);
  paint(by("map"), values, by("opacity").value / 100, true);
  by("low").textContent = number(low);
  by("high").textContent = number(high);
  by("readout").textContent = words(values);
  by("caption").textContent = data.images[state.image].caption;
  clearTimeout(told);
  told = setTimeout(() => { by("live").textContent = by("readout").textContent; }, 400);
  for (const button of by("heads").children)
    paint(button.querySelector("canvas"), row(Number(button.dataset.value), state.query), 0.75, false);
}

let waiting = false;
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

function choose(name, value) {
  state[name] = value;
  const strip = by(name === "head" ? "heads" : "images");
  for (const button of strip.children) {
    const here = Number(button.dataset.value) === value;
    button.setAttribute("aria-pressed", String(here));
    if (here) strip.scrollLeft = button.offsetLeft - strip.offsetLeft - (strip.clientWidth - button.clientWidth) / 2;
  }
  soon();
}

function button(strip, name, value, part, label) {
  const made = document.createElement("button"), caption = document.createElement("span");
  made.type = "button";
  made.dataset.value = value;
  made.title = caption.textContent = label;
  made.append(part, caption);
  made.addEventListener("click", () => choose(name, value));
  strip.append(made);
}

function enter(index) {  // a site: its heads, and the same place of the image
  const [left, top, right, bottom] = box(state.query);
  state.site = index;
  state.query = position((left + right) / 2, (top + bottom) / 2);
  const {heads, figures, columns} = site();
  by("heads").replaceChildren();
  for (let head = heads > 1 ? -1 : 0; head < heads; head++)
    button(by("heads"), "head", head, document.createElement("canvas"), head < 0 ? "mean" : `head ${head}`);
  const table = by("figures");
  table.replaceChildren();
  columns.forEach(([name, meaning], place) => {
    const line = table.insertRow(), head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    head.title = meaning;
    line.append(head);
    for (const one of figures) line.insertCell().textContent = one[place];
  });
  choose("head", heads > 1 ? Math.min(state.head, heads - 1) : 0);
}

function position(x, y) {
  const {rows, columns} = site().query;
  const place = (edges, at) => edges.slice(1, -1).filter((edge) => at >= edge).length;
  return place(rows, y) * (columns.length - 1) + place(columns, x);
}

function point(event) {
  const frame = by("map").getBoundingClientRect(), [high, wide] = data.size;
  state.query = position((event.clientX - frame.left) / frame.width * wide,
    (event.clientY - frame.top) / frame.height * high);
  soon();
}

by("map").addEventListener("pointermove", (event) => {
  if (event.buttons || (event.pointerType === "mouse" && by("follow").checked)) point(event);
});
by("map").addEventListener("pointerdown", (event) => {
  point(event);
  by("follow").checked = false;
});
by("map").addEventListener("keydown", (event) => {
  const across = width(site().query), {n} = site(), column = state.query % across;
  const moves = {ArrowLeft: column > 0 ? -1 : 0, ArrowRight: column < across - 1 ? 1 : 0,
    ArrowUp: state.query >= across ? -across : 0, ArrowDown: state.query < n - across ? across : 0,
    Home: -column, End: across - 1 - column};
  const turn = {PageUp: -1, PageDown: 1}[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || (!(event.key in moves) && !turn)) return;
  event.preventDefault();
  by("follow").checked = false;
  if (turn) choose("image", (state.image + turn + pictures.length) % pictures.length);
  else state.query += moves[event.key];
  soon();
});
by("opacity").addEventListener("input", soon);
by("site").addEventListener("change", () => enter(by("site").selectedIndex));
sites.forEach((one) => by("site").append(new Option(one.name)));
data.images.forEach((image, index) =>
  button(by("images"), "image", index, Object.assign(new Image(), {src: image.src, alt: ""}), image.caption));
const scale = by("scale").getContext("2d");
for (let place = 0; place < 256; place++) {
  scale.fillStyle = colour(place, 0, 255);
  scale.fillRect(place, 0, 1, 1);
}
state.query = position(data.size[1] / 2, data.size[0] / 2);
state.head = sites[0].heads > 1 ? -1 : 0;
enter(0);
choose("image", 0);
draw();  // so that nothing moves once the page is loaded
new ResizeObserver(soon).observe(by("map"));
Promise.all(pictures.map((picture) => picture.decode().catch(() => {}))).then(draw);
"""
