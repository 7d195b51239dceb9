"""Names and messages from files, in pages, tables, LaTeX and on terminals: shown, and never obeyed."""

import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import Browser, find_browser
from fake_results import Fake, make
from PIL import Image
from small_runs import SMALL

from sagan_attn.__main__ import main
from sagan_attn.ablation.analysis import Analysis, analyse
from sagan_attn.ablation.report import write_report
from sagan_attn.ablation.report.figures import draw, image_files
from sagan_attn.ablation.report.flat import run_records, summary_records
from sagan_attn.ablation.report.html import page
from sagan_attn.ablation.report.paper import methods, table
from sagan_attn.ablation.report.tables import csv_text, print_report
from sagan_attn.errors import SaganAttnError, one_line
from sagan_attn.files import no_formula
from sagan_attn.training.cli import main as train
from sagan_attn.training.run import load_run

# each would set window.sung, or be computed, or move the cursor, where it is taken for more than words
MARKUP = [
    "<script>sung=1</script>",
    "</script><script>sung=1</script>",
    "</title><script>sung=1</script>",
    '"><img src=x onerror=sung=1>',
    "' onmouseover='sung=1' x='",
    "<svg/onload=sung=1>",
    "<!-- <script>sung=1</script>",
    "--><script>sung=1</script>",
    "]]><script>sung=1</script>",
    "javascript:sung=1",
    "&lt;script&gt;sung=1&lt;/script&gt;",
    "<base href=https://example.invalid>",
    "<meta http-equiv=refresh content=0;url=https://example.invalid>",
    "{{constructor.constructor('sung=1')()}}",
    "${sung=1}",
    "%3Cscript%3Esung=1%3C/script%3E",
]
FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    '=HYPERLINK("http://x")',
]
LATEX = [r"\input{/etc/passwd}", r"\write18{id}", "[5cm]", "*", "%", "$x$", "a_b^c", "~", "#1", "& x", "{", "}", "\\"]
ESCAPES = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "a\rb",
    "a\nb",
    "\x08\x08",
    "\u202etxt.exe",
    "[red]x[/red]",
    "\ud800",
]
PLACES = ["../../escaped", "/etc/escaped", "torchvision/../escaped", "..", "C:\\escaped"]
WORDS = [*MARKUP, *FORMULAS, *LATEX, *ESCAPES]
TAGS = {"html", "head", "meta", "title", "style", "body", "script", "h1", "h2", "h3", "p", "div", "table", "thead"}
TAGS |= {"tbody", "tr", "th", "td", "button", "span", "b", "ul", "li", "a", "details", "summary", "dl", "dt", "dd"}
TAGS |= {"figure", "img", "noscript", "canvas", "label", "select", "input"}


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.comments: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def inert(text: str, scripts: int) -> Page:
    """The page, in which nothing but its own scripts could run, and nothing is fetched."""
    found = Page(text)
    assert {tag for tag, _ in found.tags} <= TAGS
    assert found.comments == []
    assert sum(tag == "script" for tag, _ in found.tags) == scripts
    assert sum(tag in ("meta", "title", "style") for tag, _ in found.tags) == 6
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc", "formaction")]
        assert attributes.get("href", "./").startswith("./"), tag
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
    assert "\x1b" not in text
    assert "\u202e" not in text
    return found


def hostile(words: list[str] = WORDS) -> Fake:
    """An ablation in which everything that is a text is one of these, each in every place."""
    effects = {"none": 0.0, **{f"v{index}": 0.001 * index for index in range(len(words))}}
    fake = make(effects, controls=("v0",), seeds=2, stages={"screen": (3,), "confirm": (6,)})
    fake.plan["name"] = words[0]
    for index, word in enumerate(words):
        fake.plan["variants"][f"v{index}"] |= {"label": word, "settings": {word: word}}
        result = fake.result(f"v{index}")
        result["provenance"] |= {"machine": word, "device": word, "data": word, "versions": {word: word, "torch": word}}
        for name in ("gammas", "evidence", "knockouts"):
            result[name] |= {word: {"branch_share": 0.1} if name == "evidence" else 0.1}
        result["metrics"] |= {word: 0.1}
        for epoch in result["curves"]:
            epoch[f"gamma/{word}"] = 0.1
        fake.lose(fake.result(f"v{index}", 1), kind=word, message=word)
    return fake


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    fake = hostile()
    return analyse(fake.plan, fake.results, fake.failures, fake.logits, WORDS)


def visible(word: str) -> str:
    """As a browser shows it, but for spaces."""
    return "".join(c if c.isprintable() else "" for c in word).replace(" ", "")


def test_the_report_is_inert(analysis: Analysis, tmp_path: Path):
    found = inert(page(analysis, {}, tmp_path, tmp_path), scripts=1)
    seen = "".join(found.words).replace("\N{REPLACEMENT CHARACTER}", "").replace(" ", "").replace("\n", "")
    assert all(visible(word) in seen for word in WORDS)


@pytest.mark.slow
def test_figures_are_inert(analysis: Analysis):
    """Names are drawn as shapes: an image has no text that could be anything else."""
    for name in ("forest-confirm", "gamma-confirm"):
        svg = image_files(draw(analysis)[name])["svg"].decode()
        found = Page(svg)
        assert {tag for tag, _ in found.tags} <= {"svg", "metadata", "rdf:rdf", "cc:work", "dc:type", "dc:format"} | {
            *("dc:creator", "cc:agent", "dc:title", "defs", "style", "g", "path", "use", "clippath", "rect", "image")
        }
        for _, attributes in found.tags:
            assert not [key for key in attributes if key.startswith("on")]
            assert attributes.get("xlink:href", "#").startswith(("#", "data:image/png"))
        assert "sung" not in re.sub(r"<!--.*?-->", "", svg, flags=re.S)


def test_tables_compute_nothing(analysis: Analysis):
    for records in (summary_records(analysis), run_records(analysis)):
        rows = list(csv.reader(io.StringIO(csv_text(records), newline="")))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            try:
                float(cell)
            except ValueError:
                assert not cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d")), cell
                assert not {*cell} & {*"\0\r\n\t\v\f\x1b\x85"}
        csv_text(records).encode()
    labels = {row[rows[0].index("variant")] for row in rows}
    assert "v3" in labels


def test_numbers_and_words_stay_in_tables():
    assert [no_formula(value) for value in (-1.5, None, True, "-x", "a=b", "", "'=1")] == [
        -1.5, None, True, "'-x", "a=b", "", "'=1",
    ]  # fmt: skip


def test_latex_obeys_nothing(analysis: Analysis):
    own = r"\\(?:begin|end|caption|label|centering|toprule|midrule|bottomrule|Delta|pm)\b"
    for text in (table(analysis), methods(analysis)):
        rest = re.sub(own, "", text)
        rest = re.sub(r"\\text(?:backslash|asciicircum|asciitilde|less|greater|bar|quotedbl|asciigrave)\{\}", "", rest)
        rest = re.sub(r"\\[{}$&#_%]", "", rest)
        assert {*re.findall(r"\\.", rest)} <= {"\\\\"}
        for line in rest.splitlines():
            assert not re.search(r"(?<!^)%", line)
            assert not re.match(r"\s*[\[*]", line), line  # an argument of the \\ at the end of the line before
            assert "^" not in line
            assert "#" not in line
            assert "~" not in line
        assert rest.isprintable() or {*rest} - {"\n"} <= {c for c in rest if c.isprintable()}
        assert rest.count("{") == rest.count("}")


def test_terminals_obey_nothing(analysis: Analysis, capsys: pytest.CaptureFixture[str]):
    print_report(analysis)
    text = capsys.readouterr().out
    assert {c for c in text if not c.isprintable()} == {"\n"}
    assert "[red]x[/red]" in text


@pytest.mark.slow
def test_the_command_prints_no_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr("sagan_attn.ablation.report.figures.draw", lambda analysis: {})
    names = [word.replace("/", "|") for word in WORDS if word != "\ud800"]
    fake = hostile(names)
    folder = fake.write(tmp_path / os.fsdecode(b"abl\x1b[2J\xe9<b>"))
    for name in names:
        (folder / "cells" / name).mkdir()
        result = folder / "cells" / fake.result("v1")["key"] / "result.json"
    result.write_text(json.dumps({**fake.result("v1"), "outcome": "\x1b[2J<script>"}))
    assert main(["report", str(folder), "--paper"]) == 1
    output = capsys.readouterr()
    for text in output:
        assert {c for c in text if not c.isprintable()} == {"\n"}
        assert "[red]x[" in text
    assert output.err.count("left out: ") == len(names) + 1
    inert((folder / "report" / "report.html").read_text(encoding="utf-8"), scripts=1)
    assert main(["report", "no\x1b[2J\n\x07folder"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert "\x07" not in error


def test_a_line_for_a_terminal():
    assert one_line("a\n b\x1b[1mc\u202e\ud800\x9b é [x]") == "a b?[1mc??? é [x]"
    assert one_line(SaganAttnError("a\r\nb")) == "a b"


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A run from elsewhere whose classes have such names, and images with such names beside it."""
    folder = tmp_path / "<img src=x onerror=sung=1>"
    shutil.copytree(small_run, folder)
    (folder / "classes.json").write_text(json.dumps([*MARKUP[:6], *ESCAPES[:3], FORMULAS[0]]))
    images = tmp_path / "images"
    images.mkdir()
    for name in ("<img src=x onerror=sung=1>.png", "<!-- x\x1b[2J.png", "'-sung=1-'.png", os.fsdecode(b"caf\xe9.png")):
        Image.new("RGB", (48, 48), (len(name), 9, 9)).save(images / name)
    return folder


def explored(run: Path, out: Path) -> None:
    images = str(run.parent / "images")
    assert main(["explore", "--checkpoint", str(run), "--images", images, "--out", str(out)]) == 0


def test_the_explorer_is_inert(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    explored(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    inert(text, scripts=2)
    (words,) = re.findall(r'id="data">(.*?)</script>', text, re.S)
    assert "<" not in words
    captions = [image["caption"] for image in json.loads(words)["images"]]
    classes = json.loads((run / "classes.json").read_text())
    assert all(any(caption.endswith(f"seen as {name}") for name in classes) for caption in captions)
    output = capsys.readouterr()
    assert {c for c in "".join(output) if not c.isprintable()} == {"\n"}


@pytest.mark.slow
def test_maps_are_inert(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sheet.svg"
    images = str(run.parent / "images")
    assert main(["maps", "--checkpoint", str(run), "--images", images, "--out", str(out), "--limit", "2"]) == 0
    inert((tmp_path / "sheet.html").read_text(encoding="utf-8"), scripts=0)
    for file in tmp_path.glob("*.svg"):
        assert "sung" not in re.sub(r"<!--.*?-->", "", file.read_text(), flags=re.S)
    assert {c for c in "".join(capsys.readouterr()) if not c.isprintable()} == {"\n"}


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the path")
def test_in_a_real_browser(analysis: Analysis, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is run but the pages' own scripts, nothing is fetched, and the words are there to be read."""
    path = find_browser()
    assert path is not None
    figures = draw(analysis)
    few = {name: figures[name] for name in ("forest-confirm", "gamma-confirm")}
    monkeypatch.setattr("sagan_attn.ablation.report.figures.draw", lambda analysis: few)
    write_report(tmp_path / "ablation", analysis)
    explored(run, tmp_path / "page.html")
    pages = {tmp_path / "ablation" / "report" / "report.html": MARKUP, tmp_path / "page.html": []}
    with Browser(path) as browser:
        for at, words in pages.items():
            browser.open(at)
            browser.value("document.querySelectorAll('button, th, summary').forEach((one) => one.click())")
            browser.value("document.querySelectorAll('*').forEach((one) => one.dispatchEvent(new Event('mouseover')))")
            assert browser.value("typeof sung") == "undefined"
            text = browser.value("document.body.textContent")
            assert all(word in text for word in words)
            assert browser.value("document.title").startswith(("Ablation <script>sung", "Attention of <img src=x"))
        assert {url.partition(":")[0] for url in browser.urls()} == {"file", "data"}
        assert {url for url in browser.urls() if url.startswith("file:")} == {at.resolve().as_uri() for at in pages}
        assert browser.complaints() == []


@pytest.mark.parametrize(
    "name", ["a/../../escaped\x1b[2J\0b", *(pytest.param(name, marks=pytest.mark.slow) for name in PLACES)]
)
def test_a_hosts_name_leads_nowhere(name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    """Runs are called after their host."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert train(["fit", *SMALL, "--model.host.name", name]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "\x1b" not in error
    assert [path for path in tmp_path.rglob("*") if "escaped" in path.name or path.is_file()] == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../x"},
        {"name": "__class__"},
        {"at": "../../etc"},
        {"block": "os.system"},
        {"block": "../sagan"},
        {"options": {"heads": "__import__('os')"}},
        {"at": {"class_path": "os.system"}},
    ],
)
def test_a_run_names_blocks_and_places_alone(change: dict[str, Any], small_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["grafts"][0] |= change
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SaganAttnError):
        load_run(folder)
