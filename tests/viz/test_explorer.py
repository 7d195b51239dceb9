"""The explorer: what is in the page, and that it works in a browser."""

import base64
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from looks import images, model, seen
from PIL import Image
from torch import nn

from sagan_attn import graft
from sagan_attn.__main__ import main
from sagan_attn.errors import GraftError
from sagan_attn.viz.cells import Axis, Places
from sagan_attn.viz.explorer import explorer_page, quantised
from sagan_attn.viz.look import look

NAME = "</script><script>alert('x')</script> & \"quoted\" é"
MOVES = (
    ("ArrowLeft", "0, column 6"),
    ("ArrowDown", "1, column 6"),
    ("Home", "1, column 0"),
    ("ArrowLeft", "1, column 0"),
    ("End", "1, column 7"),
    ("ArrowUp", "0, column 7"),
)
path_of_browser = find_browser()


def content(page: str) -> dict:
    (words,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(words)


def decoded(site: dict, images: int) -> np.ndarray:
    """Weights [B, h, N, M] as the page's script reads them."""
    queries, keys = ((len(site[k]["rows"]) - 1) * (len(site[k]["columns"]) - 1) for k in ("query", "key"))
    shape = (images, site["heads"], queries)
    steps = np.frombuffer(base64.b64decode(site["weights"]), np.uint8).reshape(*shape, keys)
    limits = np.frombuffer(base64.b64decode(site["range"]), "<f4").reshape(*shape, 2).astype(float)
    return limits[..., :1] + steps * (limits[..., 1:] - limits[..., :1]) / 255


def test_weights_are_kept_to_a_255th_of_the_largest_of_their_row():
    view = seen()
    (site,) = content(explorer_page(view, "t"))["sites"]
    (record,) = view.records.values()
    weights = record.weights.double().numpy()
    error = np.abs(decoded(site, 2) - weights)
    assert (error <= weights.max(-1, keepdims=True) / 255).all()
    assert site["query"] == {"rows": [0, 2, 4, 6, 8, 10, 12], "columns": list(range(0, 17, 2))}
    steps, limits = quantised(torch.tensor([[0.0, 0.0], [-1.0, 3.0], [0.5, 1.0]]))
    assert limits.tolist() == [[0, 0], [-1, 3], [0, 1]]
    assert steps.tolist() == [[0, 0], [0, 255], [128, 255]]


def test_the_page_says_what_was_left_out_and_why_cells_differ():
    page = explorer_page(seen(), "t")
    assert "2 images." in page
    assert "receptive field" not in page
    view = replace(seen(), left_out=3, places=Places(12, 16, ({6: Axis(0.5, 2.0)}, {})))
    page = explorer_page(view, "t")
    assert "2 of 5 images." in page
    assert "nearest to the centre of its receptive field" in page


def test_the_command_counts_what_its_limit_leaves_out(small_run: Path, tmp_path: Path):
    for place, image in enumerate(images(3, 48, 48)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{place}.png")
    out = tmp_path / "page.html"
    for limit, words in (("2", "2 of 3 images."), ("3", ">3 images.")):
        run = ["explore", "--checkpoint", str(small_run), "--out", str(out), "--images", str(tmp_path)]
        assert main([*run, "--limit", limit]) == 0
        assert words in out.read_text()


def test_names_are_escaped_and_nothing_is_fetched():
    page = explorer_page(seen((NAME, "two")), NAME)
    assert "<script>alert" not in page
    assert content(page)["images"][0]["caption"] == NAME
    assert page.count("<script") == 2
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.replace("http-equiv", "")


def test_eight_images_at_16_by_16_stay_below_5_mb():
    network = nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graft(network, "1", "multihead", options={"heads": 4}, example_input=torch.rand(1, 3, 32, 32))
    view = seen([f"image {i}" for i in range(8)], network, height=32, width=32)
    assert 2_000_000 < len(explorer_page(view, "t").encode()) < 5_000_000
    with pytest.raises(GraftError, match=r"\[8, 4, 256, 256\].* would make a page of 11,184,812 bytes, and 5,000,000"):
        explorer_page(_four_times(view), "t")
    with pytest.raises(GraftError, match=r"the page would take .* bytes, and 2,800,000 are allowed"):
        explorer_page(view, "t", 2_800_000)


def _four_times(view):
    (record,) = view.records.values()
    return type(view)(view.images, view.captions, dict.fromkeys("abcd", record), view.places)


@pytest.mark.skipif(path_of_browser is None, reason="no Chromium on the path")
@pytest.mark.slow
def test_in_a_real_browser(tmp_path: Path):
    """Hover, click, keys, touch and every control; no request, no complaint, no sideways scrolling on a phone."""
    network = nn.Sequential(model()[:2], model(1, "sagan", pool=2)[:2])
    network[1][0] = nn.Conv2d(8, 8, 1)
    pictures = seen().images
    view = look(network, pictures / 255, pictures, (NAME, "two"))
    assert len(view.records) == 2
    at = tmp_path / "a page #1.html"
    at.write_text(explorer_page(view, NAME), encoding="utf-8")
    assert path_of_browser is not None
    with Browser(path_of_browser) as browser:

        def text(name: str, has: str) -> str:
            """What an element says, once that is in it; the page draws with the next frame."""
            return until(f"document.getElementById('{name}').textContent", lambda found: has in found)

        def until(expression: str, fits: Callable[[Any], bool]) -> Any:
            end = time.monotonic() + 10
            while not fits(found := browser.value(expression)):
                assert time.monotonic() < end, f"{expression} is {found!r}"
                time.sleep(0.05)
            return found

        def mouse(kind: str, x: float, y: float) -> None:
            """At a pixel of the image."""
            frame = browser.value("(({x, y, width, height}) => [x, y, width, height])(map.getBoundingClientRect())")
            place = {"x": frame[0] + x / 16 * frame[2], "y": frame[1] + y / 12 * frame[3]}
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            browser.ask("Input.dispatchMouseEvent", type=kind, **place, **button)

        def key(name: str) -> None:
            for kind in ("rawKeyDown", "keyUp"):
                browser.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name)

        for width, dark in ((1280, False), (390, True)):
            browser.open(at, width, 900, dark=dark)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.title") == NAME
            text("caption", NAME)
            text("readout", "Query: row 3, column 4 (x 8 to 10, y 6 to 8 pixels).")
        browser.open(at, 1280, 900)
        mouse("mouseMoved", 3, 11)
        text("readout", "Query: row 5, column 1 ")
        (first, second) = view.records.values()
        mean = first.weights[0, :, 5 * 8 + 1].mean(0)
        row, column = divmod(int(mean.argmax()), 8)
        text("readout", f"Most weight: {float(mean.max()):.2g}"[:-1])
        text("readout", f"on row {row}, column {column}.")
        mouse("mousePressed", 15, 1)
        mouse("mouseReleased", 15, 1)
        mouse("mouseMoved", 3, 11)
        time.sleep(0.2)  # it would have moved by now
        text("readout", "Query: row 0, column 7 ")
        assert browser.value("document.getElementById('follow').checked") is False
        browser.value("document.getElementById('map').focus()")
        for name, found in MOVES:
            key(name)
            text("readout", f"row {found} ")
        key("PageDown")
        text("caption", "two")
        said = text("readout", "row 0, column 7")
        text("live", said)
        browser.value("document.querySelectorAll('#images button')[0].click()")
        text("caption", NAME)
        browser.value("document.querySelectorAll('#heads button')[2].click()")
        text("high", f"{float(first.weights[0, 1, 7].max()):.2g}"[:-1])
        pressed = "[...document.querySelectorAll('#heads button')].map((one) => one.getAttribute('aria-pressed'))"
        assert browser.value(pressed) == ["false", "false", "true"]
        pixels = "[...map.getContext('2d').getImageData(2, map.height - 3, 1, 1).data]"
        with_weights = browser.value(pixels)
        browser.value("opacity.value = 0; opacity.dispatchEvent(new Event('input'))")
        own = view.images[0, :, 11, 0].tolist()
        assert with_weights[:3] != own
        until(pixels, lambda found: found[:3] == own)
        browser.value("opacity.value = 100; opacity.dispatchEvent(new Event('input'))")
        browser.value(
            "document.getElementById('site').selectedIndex = 1;"
            "document.getElementById('site').dispatchEvent(new Event('change'))"
        )
        text("readout", "Query: row 0, column 7 ")
        assert len(browser.value(pressed)) == 1
        text("high", f"{float(second.weights[0, 0, 7].max()):.2g}"[:-1])
        browser.open(at, 390, 844)
        frame = browser.value("(({x, y, width, height}) => [x, y, width, height])(map.getBoundingClientRect())")
        finger = {"x": frame[0] + 0.05 * frame[2], "y": frame[1] + 0.05 * frame[3]}
        browser.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[finger])
        text("readout", "Query: row 0, column 0 ")
        browser.ask(
            "Input.dispatchTouchEvent",
            type="touchMove",
            touchPoints=[{"x": frame[0] + 0.95 * frame[2], "y": finger["y"]}],
        )
        text("readout", "Query: row 0, column 7 ")
        browser.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert [one for one in browser.complaints() if "readback" not in one] == []  # of the pixels asked for above
        assert {url for url in browser.urls() if not url.startswith("data:")} == {at.resolve().as_uri()}
