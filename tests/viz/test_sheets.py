"""Sheets and summaries: what is drawn where, and a reference picture."""

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from looks import model, seen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from sagan_attn.errors import GraftError
from sagan_attn.viz.cells import Axis, Places
from sagan_attn.viz.draw import check_output, plain, save_figure
from sagan_attn.viz.look import Look, look
from sagan_attn.viz.record import AttentionRecord
from sagan_attn.viz.sheets import attention_sheet, head_matrices
from sagan_attn.viz.site_summary import summary_figure, summary_page

REFERENCE = Path(__file__).with_name("reference_sheet.png")
TOLERANCE = 8  # root mean square difference of pixels, of 255: fonts differ a little between versions


def drawn() -> Look:
    """By formula: two heads on a 4 x 4 map of a 32 x 32 image with strided cells, the keys pooled by 2."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([8 * rows, 8 * columns, 128 + 0 * rows]).to(torch.uint8)
    query, key = torch.arange(16)[:, None], torch.arange(4)[None]
    scores = torch.stack([(query % 4 + key).float() / 2, -(query // 4 - key).abs().float()])
    record = AttentionRecord(
        "layer.grafts.two", "layer", 0, scores.softmax(-1)[None], torch.arange(16), (4, 4), (2, 2), 2
    )
    axis = {4: Axis(0.5, 8.0)}
    return Look(image[None], ["a made-up image"], {record.path: record}, Places(32, 32, (axis, axis)))


def pixels(figure, dpi: int = 60) -> np.ndarray:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return math.sqrt(((one - other) ** 2).mean())


def test_reference_picture():
    sheet = attention_sheet(drawn(), "layer.grafts.two", [5, 14])
    with Image.open(REFERENCE) as image:
        expected = np.asarray(image.convert("RGB")).astype(float)
    assert difference(pixels(sheet), expected) < TOLERANCE
    assert difference(pixels(attention_sheet(drawn(), "layer.grafts.two", [5, 2])), expected) > TOLERANCE


def test_weights_lie_on_the_pixels_of_their_keys():
    view = drawn()
    (record,) = view.records.values()
    figure = attention_sheet(view, record.path, [5])
    image, first, second = figure.axes[:3]
    meshes = [next(c for c in axes.collections if isinstance(c, QuadMesh)) for axes in (first, second)]
    for head, mesh in enumerate(meshes):
        assert mesh.get_array().ravel().tolist() == pytest.approx(record.weights[0, head, 5].tolist())
        assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 12.5, 32]  # cells of 8 from -3.5 on, two a key
        assert mesh.get_coordinates()[:, 0, 1].tolist() == [0, 12.5, 32]
        assert mesh.get_clim() == (0, float(record.weights[0, :, 5].max()))  # one scale
    assert image.lines[0].get_xydata().tolist() == [[8.5, 8.5]]  # cell (1, 1) is 4.5 to 12.5
    assert image.get_xlabel() == "query row 1, column 1"
    assert [axes.get_title() for axes in (image, first, second)] == ["image", "head 0", "head 1"]
    assert figure.axes[-1].get_ylabel() == "attention weight"
    assert figure.get_suptitle() == "Attention at layer: what a query (cross) looks at"
    assert "at the rim may be smaller or larger" in figure.get_supxlabel().replace("\n", " ")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)

    def at(x: float, y: float) -> np.ndarray:
        column, row = second.transData.transform((x, y))
        return shown[int(shown.shape[0] - row), int(column)]

    # head 1 has the most weight on key 1, right of 12.5 and above it: lighter than left and below, over the same grey
    assert at(28, 4).sum() > at(4, 28).sum() + 60


def test_matrices_have_names():
    figure = head_matrices(drawn(), "layer.grafts.two")
    first, _, heads = figure.axes[:3]
    assert (first.get_xlabel(), first.get_ylabel()) == (
        "key position, row · 2 + column",
        "query position, row · 4 + column",
    )
    assert (heads.get_title(), heads.get_xlabel(), heads.get_ylabel()) == ("agreement of heads", "head", "head")
    (matrix,) = first.images
    assert matrix.get_array().shape == (16, 4)


def test_summary_as_figure_and_page():
    view = seen(("one", "<b>two</b>"))
    (path,) = view.records
    figure = summary_figure(view, path, [0, 9])
    titles = {axes.get_title() for axes in figure.axes} - {""}
    assert titles >= {"entropy / ln(keys)", "weight on the query's own key", "query-independence", "agreement of heads"}
    assert "importance (l2 norm 1)" in titles
    assert figure.get_supxlabel() == ""  # its cells are all alike
    assert "2 of 5 images" in summary_figure(replace(view, left_out=3), path, [0]).get_suptitle()
    page = summary_page(view, path, [0, 9])
    assert len(re.findall(r"<tr>", page)) == 3
    assert "script-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert '<th scope="col" title="from query to key, pixels, mean by weight">distance (pixels)</th>' in page


def test_one_head_has_one_chart():
    view = seen(network=model(1))
    (path,) = view.records
    (one,) = view.figures(path)
    figure = summary_figure(view, path, [0])
    shares, distance = figure.subfigs[1].axes
    names = [label.get_text() for label in shares.get_yticklabels()]
    assert names == ["entropy / ln(keys)", "weight on the query's own key", "query-independence"]
    widths = [bar.get_width() for bar in shares.patches]
    assert widths == [one.entropy_share, one.self_weight, one.query_independence]
    assert [bar.get_width() for bar in distance.patches] == [one.distance]
    (record,) = view.records.values()
    signed = replace(view, records={path: replace(record, weights=-record.weights)})
    assert len(summary_figure(signed, path, [0]).subfigs[1].axes[0].patches) == 1  # no shares: its own weight alone


@pytest.mark.slow
def test_files_are_the_same_each_time(tmp_path):
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        files = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for file in files:
            figure = Figure(figsize=(2, 2), layout="constrained")
            figure.subplots().set_title("a title")
            save_figure(figure, file)
        one, other = (file.read_bytes() for file in files)
        assert one == other
        assert one.startswith(start)


def test_refusals(tmp_path):
    view = drawn()
    (path,) = view.records
    for queries, message in (([], "queries is empty"), ([16], "query 16 must be .* from 0 to 15"), ([-1], "query -1")):
        with pytest.raises(GraftError, match=message):
            attention_sheet(view, path, queries)
    many = Look(view.images.expand(41, -1, -1, -1), ["i"] * 41, {path: _many(view, 41)}, view.places)
    with pytest.raises(GraftError, match="41 images with 1 queries each make 41 rows; a sheet has 40"):
        attention_sheet(many, path, [0])
    with pytest.raises(GraftError, match=r"must end in \.png, \.svg, \.pdf"):
        save_figure(head_matrices(view, path), tmp_path / "a.gif")
    with pytest.raises(GraftError, match=r"there is no folder .*nowhere' to write 'a.png' into: make it first"):
        check_output(tmp_path / "nowhere" / "a.png", (".png",))


def _many(view: Look, count: int) -> AttentionRecord:
    (record,) = view.records.values()
    return AttentionRecord(*{**vars(record), "weights": record.weights.expand(count, -1, -1, -1)}.values())


def test_names_are_cut_and_cleaned():
    assert plain("a\nb\x00") == "a b "
    assert len(plain("x" * 100)) == 48
    assert plain("<b>$x$</b>") == "<b>$x$</b>"


def test_a_look_runs_once_in_eval_mode_and_knows_importance_where_labels_are():
    network = model().train()
    view = seen(network=network)
    assert network.training
    (path,) = view.records
    assert view.importance[path].norm() == pytest.approx(1)
    assert len(view.figures(path)) == 2
    assert not look(network, view.images / 255, view.images, view.captions).importance
    for compiled in (torch.compile(model(), backend="eager"), model()):
        compiled.compile(backend="eager")
        again = look(compiled, view.images / 255, view.images, view.captions)
        (record,) = again.records.values()
        assert torch.equal(record.weights, view.records[path].weights)
        assert again.cells(record.path) == view.cells(path)
    with pytest.raises(GraftError, match="max_bytes allows 100"):
        look(network, view.images / 255, view.images, view.captions, max_bytes=100)
