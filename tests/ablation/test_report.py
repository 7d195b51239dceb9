"""The report: page, tables, figures, paper, and the command."""

import base64
import csv
import hashlib
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, find_browser
from fake_results import Fake, hostile, make

from sagan_attn.__main__ import main
from sagan_attn.ablation.analysis import Analysis, analyse
from sagan_attn.ablation.report import write_report
from sagan_attn.ablation.report.figures import draw, image_files
from sagan_attn.ablation.report.flat import run_records, summary_records
from sagan_attn.ablation.report.html import page
from sagan_attn.ablation.report.paper import escape, methods, paper_files, table
from sagan_attn.ablation.report.tables import csv_text, parquet_bytes, print_report
from sagan_attn.ablation.statistics import Interval
from sagan_attn.ablation.verdict import interval_words
from sagan_attn.errors import ConfigError

NAME = "<script>alert('x')</script> & $\\frac{1}$ a_b%"
SAGAN = "sagan at layer3"
FIGURES = ("forest-confirm", "curves-screen", "gamma-screen", "cost-screen-3")
VOID = {"meta", "img", "br"}


def of(fake: Fake) -> Analysis:
    return analyse(fake.plan, fake.results, fake.failures, fake.logits)


@pytest.fixture(scope="module")
def bad() -> Analysis:
    return of(hostile())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, bad: Analysis) -> Path:
    """Folder of a hostile ablation with its report; of the figures, which take most of the time, one of a kind."""
    fake = hostile()
    folder = fake.write(tmp_path_factory.mktemp("ablation") / "a folder #1")

    def some(analysis: Analysis) -> dict:
        figures = draw(analysis)
        return {name: figures[name] for name in FIGURES}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sagan_attn.ablation.report.figures.draw", some)
        write_report(folder, bad, paper=True)
    return folder


class Page(HTMLParser):
    """Tags and their attributes, with the nesting checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_one_file_that_fetches_nothing(written: Path):
    text = (written / "report" / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert {tag for tag, _ in found.found}.isdisjoint({"link", "iframe", "object", "embed", "base", "form", "svg"})
    for tag, attributes in found.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/svg+xml;base64,")
        if "href" in attributes:
            assert attributes["href"].startswith("./")
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [meta["content"] for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    for image in found.all("img"):
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        assert "<script" not in svg
        assert not re.search(r'(href|src)="(?!#)', svg)


def test_the_page_escapes_what_comes_from_files(written: Path):
    text = (written / "report" / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1
    assert "<img src=" not in text.replace('<img alt="', "")
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; $\\frac{1}$ a_b%" in text
    seen = "".join(Page(text).text)
    assert NAME in seen
    assert 'crash: <img src="http://evil.example/x" onerror=alert(1)> "boom"' in seen
    assert "\x07" not in page(of(renamed("a\x07b")), {}, written, written)


def renamed(label: str) -> Fake:
    fake = make({"none": 0.0, "sagan": 0.01}, controls=(), seeds=3)
    fake.plan["variants"]["sagan"]["label"] = label
    return fake


def test_the_page_says_the_verdict_first_and_links_every_cell(written: Path, bad: Analysis):
    found = Page((written / "report" / "report.html").read_text(encoding="utf-8"))
    seen = "".join(found.text)
    places = [seen.index(group.verdict) for group in bad.groups]
    assert places == sorted(places)
    assert places[-1] < seen.index("of the last epoch")
    assert seen.count("screen: not to be quoted") == 1
    assert "Not to be quoted: 2 of 48 cells of confirm, 6 epochs have no result." in seen
    assert all(mark in seen for group in bad.groups for mark in group.marks)
    links = [written / "report" / link["href"] for link in found.all("a")]
    assert all(link.is_file() for link in links)
    names = {(link.parent.name, link.name) for link in links}
    for cell in bad.cells:
        if cell.state != "missing":
            file = "failure.json" if cell.state == "failed" else "result.json"
            assert {(cell.key, "config.yaml"), (cell.key, "log.txt"), (cell.key, file)} <= names


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr("sagan_attn.ablation.report.figures.draw", lambda analysis: {})


@pytest.mark.usefixtures("no_figures")
def test_the_page_elsewhere_links_back(tmp_path: Path):
    fake = make({"none": 0.0, "sagan": 0.01}, controls=(), seeds=2)
    folder = fake.write(tmp_path / "of: this")
    at = tmp_path / "pages" / "one.html"
    assert write_report(folder, of(fake), html=at)[-1] == at
    links = Page(at.read_text(encoding="utf-8")).all("a")
    assert len(links) == 12
    assert links[0]["href"].startswith("./../of%3A%20this/cells/")


def test_figures(written: Path, bad: Analysis):
    expected = {f"{kind}-{stage}" for kind in ("forest", "curves", "gamma") for stage in ("screen", "confirm")}
    expected |= {"cost-screen-3", "cost-confirm-6", "cost-confirm-12"}
    files = {path.name for path in (written / "report" / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    figures = draw(bad)
    assert figures.keys() == expected
    figure = figures["forest-confirm"]
    for axes, group in zip(figure.axes, bad.stage("confirm"), strict=True):
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [row.variant.label for row in group.rows[1:]]
        for place, row in enumerate(group.rows[1:]):
            if row.difference:
                ends = [100 * row.difference.low, 100 * row.difference.high]
                assert any(
                    list(line.get_xdata()) == ends and int(line.get_ydata()[0] + 0.2) == place for line in axes.lines
                )
        words = [text.get_text() for text in axes.texts]
        assert words == [row.why_none for row in group.rows[1:] if row.why_none]
    first, again = (image_files(draw(of(renamed("_x")))["forest-confirm"]) for _ in range(2))
    assert first == again
    assert first["png"].startswith(b"\x89PNG")


def test_one_epoch_is_drawn_as_bars():
    fake = make(seeds=2, stages={"confirm": (1,)})
    (axes,) = draw(of(fake))["curves-confirm"].axes
    assert list(axes.get_xticks()) == [1]
    assert len(axes.containers) == len({result["variant"] for result in fake.results})
    assert len({float(bars[0].get_xdata()[0]) for bars in axes.containers}) == len(axes.containers)


def test_an_axis_of_cost_spans_what_its_labels_tell_apart():
    fake = make({"none": 0.0, "sagan": 0.01}, controls=(), seeds=2)
    for place, result in enumerate(fake.results):
        result["cost"] |= {"peak_bytes": 725_500_000 + 10_000 * place, "parameters": 20_000 + 1000 * place}
    figure = draw(of(fake))["cost-confirm-6"]
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert len(set(labels)) == len(labels)
    low, high = figure.axes[-1].get_xlim()
    assert high - low == pytest.approx(0.01 * 725.5e6, rel=1e-3)


def test_nothing_has_no_sign():
    assert interval_words(Interval(-0.00001, -0.0017, 0.0017, 0.001, 6)) == "0.00 [-0.17, +0.17]"
    assert interval_words(Interval(0.0, -0.00002, 0.00002, 0.001, 6), signed=False) == "0.00 [0.00, 0.00]"


def test_many_variants_are_not_all_drawn_as_curves():
    fake = make({"none": 0.0, **{f"v{place}": 0.001 * place for place in range(12)}}, controls=("v0",), seeds=2)
    figures = draw(of(fake))
    (axes,) = figures["curves-confirm"].axes
    assert "5 variants not drawn" in axes.get_title(loc="left")
    assert len(axes.lines) == 8
    legend = [text.get_text() for text in figures["curves-confirm"].legends[0].get_texts()]
    assert legend[:2] == ["none", "v0"]
    assert "v11" in legend


def test_csv_holds_the_numbers(bad: Analysis):
    rows = list(csv.DictReader(csv_text(summary_records(bad)).splitlines()))
    assert len(rows) == 18
    for record, row in zip(rows, [row for group in bad.groups for row in group.rows], strict=True):
        assert record["variant"] == row.variant.name
        assert int(record["planned"]) == 8
        if row.difference:
            assert float(record["difference_mean"]) == row.difference.mean
            assert float(record["difference_low"]) == row.difference.low
            assert float(record["p_adjusted"]) == row.p
        else:
            assert record["difference_mean"] == ""
    runs = list(csv.DictReader(csv_text(run_records(bad)).splitlines()))
    assert len(runs) == 144
    by_key = {cell.key: cell for cell in bad.cells}
    for run in runs:
        cell = by_key[run["key"]]
        assert run["state"] == cell.state
        if cell.stage == "confirm" and cell.state == "finished":
            assert float(run["test/accuracy"]) == cell.accuracy
        assert run["provenance/versions.torch"] in ("2.8.0", "2.9.0" if cell.state == "finished" else "")
    assert csv_text([]) == ""


def test_parquet(bad: Analysis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("pyarrow")
    import pandas as pd

    path = tmp_path / "table.parquet"
    path.write_bytes(parquet_bytes(summary_records(bad)))
    assert list(pd.read_parquet(path)["variant"]) == [row.variant.name for group in bad.groups for row in group.rows]


def test_parquet_without_pyarrow(bad: Analysis, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'sagan_attn\[report\]'"):
        parquet_bytes(summary_records(bad))


def test_paper(written: Path, bad: Analysis):
    text = table(bad)
    assert (written / "report" / "paper" / "table.tex").read_text() == text
    assert text.startswith("% NOT TO BE QUOTED: 2 of 48 cells")
    assert (
        r"\textless{}script\textgreater{}alert('x')\textless{}/script\textgreater{} \& \$\textbackslash{}frac" in text
    )
    assert r"a\_b\%" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\end{table}") == 2
    body = re.findall(r"\\midrule\n(.*?)\n\\bottomrule", text, re.DOTALL)
    assert all(line.count(" & ") == 6 for part in body for line in part.replace(r" \& ", "").splitlines())
    row = bad.groups[0].row(SAGAN)
    assert row is not None
    assert row.difference is not None
    assert (
        f"{SAGAN} & 8/8 & {100 * row.mean:.2f} $\\pm$ {100 * row.sd:.2f} & ${100 * row.difference.mean:+.2f}$ [$"
        in text
    )
    assert "Preliminary" not in table(of(make(stages={"confirm": (6, 12)})))
    words = methods(bad)
    for said in (
        "8 seeds (1000 to 1007)",
        "budgets of 6 and 12 epochs",
        "3 attention variants were screened on the validation split alone with 8 seeds; confirmed with fresh seeds",
        r"95 \% t interval by seed",
        "max-t (Westfall and Young, 1993)",
        "all of them enumerated",
        "Controls: conv, context-max. 1 of 96 runs diverged",
        "Added after looking at results: seeds 1007.",
        "mixed provenance: different versions of torch",
    ):
        assert said in words
    with pytest.raises(ConfigError, match="nothing is: run the confirm stage first"):
        paper_files(of(make(stages={"screen": (3,)})))


def test_latex_escapes_every_special_character():
    assert escape(r"a\b{c}$&#_%^~") == (r"a\textbackslash{}b\{c\}\$\&\#\_\%\textasciicircum{}\textasciitilde{}")
    assert escape("a\nb\x1b") == "a b "


def test_terminal(bad: Analysis, capsys: pytest.CaptureFixture[str]):
    fake = hostile()
    fake.plan["variants"]["conv"]["label"] = "co\x1b[2Jnv"
    print_report(of(fake))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.startswith(f"confirm, 6 epochs: {SAGAN} gains over none at 6 epochs: +")
    assert "screen, 3 epochs (not to be quoted); val/accuracy" in text
    assert "! 1 of 48 cells failed" in text
    assert "1 of 8 runs diverged" in text
    row = bad.groups[0].row(SAGAN)
    assert row is not None
    assert row.difference is not None
    assert f"{100 * row.difference.mean:+.2f} [{100 * row.difference.low:+.2f}, " in text


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["report", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("no_figures")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fake = make({"none": 0.0, "conv": 0.0, "sagan": 0.02}, stages={"confirm": (6, 12)}, seeds=6)
    folder = fake.write(tmp_path / "ablation")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    extra = tmp_path / "copy.csv"
    code, out, error = report(capsys, str(folder), "--csv", str(extra))
    assert (code, error) == (0, "")
    assert "sagan gains over none at 12 epochs: +" in out
    assert out.splitlines()[-1] == str(folder / "report" / "report.html")
    assert extra.read_text() == (folder / "report" / "table.csv").read_text()
    assert not (folder / "report" / "paper").exists()
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.usefixtures("no_figures")
def test_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fake = make({"none": 0.0, "sagan": 0.02}, controls=(), seeds=6)
    folder = fake.write(tmp_path / "ablation")
    half, foreign = (folder / "cells" / fake.result("sagan", index)["key"] for index in (0, 1))
    text = (half / "result.json").read_text()
    (half / "result.json").write_text(text[: len(text) // 2])
    (foreign / "result.json").write_text(json.dumps({**fake.result("sagan", 1), "seed": 5}))
    logits = folder / "cells" / fake.result("none", 3)["key"] / "logits.safetensors"
    logits.write_bytes(logits.read_bytes()[:100])
    code, out, error = report(capsys, str(folder))
    assert code == 1
    assert error.count("left out: ") == 2
    assert str(half / "result.json") in error
    assert str(foreign / "result.json") in error
    assert "2 of 6 pairs are missing" in out
    assert (half / "result.json").read_text() == text[: len(text) // 2]
    seen = "".join(Page((folder / "report" / "report.html").read_text()).text)
    assert "Files that were left out:" in seen
    (half / "result.json").write_text(text)
    (foreign / "result.json").write_text(json.dumps(fake.result("sagan", 1)))
    code, out, error = report(capsys, str(folder))
    assert code == 1
    assert str(logits) in error  # read now that there are pairs
    assert "1 of 6 pairs have no usable logits" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "there is no folder 'gone'"),
        (["."], "plan.json is missing"),
        (["ablation", "--csv", "gone/table.csv"], "the report cannot be written"),
        (["ablation", "--paper"], "nothing is: run the confirm stage first"),
        ([], "the following arguments are required: folder"),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make({"none": 0.0, "sagan": 0.02}, controls=(), seeds=2, stages={"screen": (2,)}).write(tmp_path / "ablation")
    code, _, error = report(capsys, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the path")
def test_in_a_real_browser(written: Path, tmp_path: Path):
    """Nothing is fetched, nothing complains, headings sort, a phone needs no sideways scrolling."""
    path = find_browser()
    assert path is not None
    at = written / "report" / "report.html"
    with Browser(path) as browser:
        for width, dark in ((1400, False), (390, True)):
            browser.open(at, width, dark=dark)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.title") == "Ablation fake"
            assert browser.value("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
            browser.screenshot(tmp_path / f"{width}.png")
            assert (tmp_path / f"{width}.png").read_bytes().startswith(b"\x89PNG")
        classes = "document.querySelector('.wide').className"
        assert browser.value(classes) == "wide scrolls more"
        browser.value("document.querySelector('.wide').scrollLeft = 1e6")
        time.sleep(0.2)
        assert browser.value(classes) == "wide scrolls"
        column = "[...document.querySelector('table').tBodies[0].rows].map((row) => Number(row.cells[2].dataset.v))"
        button = "document.querySelector('table').tHead.rows[0].cells[2].querySelector('button').click()"
        before = browser.value(column)
        for reverse in (False, True):
            browser.value(button)
            assert browser.value(column) == sorted(before, reverse=reverse)
        assert before != sorted(before)
        browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
        assert browser.value("window.ran") is None  # the policy stops a script that is not the page's own
        assert {url.partition(":")[0] for url in browser.urls()} == {"file", "data"}
        assert {url for url in browser.urls() if url.startswith("file:")} == {at.resolve().as_uri()}
        assert all("Content Security Policy" in line for line in browser.complaints())
        assert len(browser.complaints()) == 1  # of that script
