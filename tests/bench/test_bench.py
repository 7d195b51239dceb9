"""`python -m sagan_attn bench`, on tiny shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sagan_attn.__main__ import main

ONCE = ("--repetitions", "1", "--seconds", "0", "--quick")


def bench(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON file and what was printed; the plot was drawn."""
    files = folder / "found.json", folder / "found.png"
    assert main(["bench", *arguments, *ONCE, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    assert files[1].read_bytes().startswith(b"\x89PNG")
    found = json.loads(files[0].read_text())
    assert {"cpu", "threads", "versions", "date"} <= found["machine"].keys()
    assert found["options"]["bench"] == found["bench"] == arguments[0]
    return found, capsys.readouterr().out


def test_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    peers = ("--peers", "plain,sdpa-padded,multihead", "--dtypes", "fp32")
    found, text = bench(tmp_path, capsys, "block", "--shapes", "2,16,3x4", "1,64,2x2", *peers)
    assert found["ceilings"]["bytes_per_second"] > 0
    sizes = [
        tuple(case[key] for key in ("batch", "channels", "height", "width", "backward")) for case in found["cases"]
    ]
    assert sizes == [(2, 16, 3, 4, False), (2, 16, 3, 4, True), (1, 64, 2, 2, False), (1, 64, 2, 2, True)]
    for case in found["cases"]:
        assert case["skipped"] == {}
        assert case["peers"].keys() == {"sagan", "plain", "sdpa-padded", "multihead"}
        for peer in case["peers"].values():
            assert 0 < peer["ms"]["min"] <= peer["ms"]["median"] <= peer["ms"]["max"]
            assert peer["ms"]["repetitions"] == 1
            assert peer["times_floor"] == pytest.approx(peer["ms"]["median"] / case["floor_ms"])
    assert "2, 16, 3 x 4" in text
    assert "vs plain" in text


@pytest.mark.slow
def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ("--sizes", "8", "4x4", "8x16", "--channels", "16", "--max-bytes", "50000")
    found, text = bench(tmp_path, capsys, "scaling", *small)
    assert [case["height"] * case["width"] for case in found["cases"]] == [16, 64, 128]
    assert "more than max_bytes (50,000)" in found["cases"][-1]["skipped"]["plain"]
    assert all(case["peers"]["sagan"]["peak_bytes"] > 0 for case in found["cases"])
    assert found["exponents"]["fp32"]["plain"].keys() == {"time", "memory"}
    assert "sagan, fp32: time ~ N^" in text


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny = ("--model", "resnet20", "--at", "layer2,layer3", "--image-size", "16", "--batch-size", "4")
    found, text = bench(tmp_path, capsys, "step", *tiny, "--channels-last")
    (case,) = found["cases"]
    assert case["grafts"] == ["layer2.2.grafts.sagan", "layer3.2.grafts.sagan"]
    assert case["batch"] == 4
    assert case["images_per_second"]["host"]["median"] == pytest.approx(4000 / case["step_ms"]["host"]["median"])
    assert case["latency_ms"].keys() == {"host", "grafted", "fused"}
    assert case["peak_bytes"]["grafted"] > case["peak_bytes"]["host"] > 0
    assert case["grafted_over_host"] > 0
    assert "not measured" in text


@pytest.mark.slow
def test_step_of_a_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found, _ = bench(tmp_path, capsys, "step", "--preset", "faster-rcnn", "--image-size", "64", "--batch-size", "1")
    assert found["cases"][0]["grafts"] == ["backbone.body.layer3.5.grafts.sagan"]


def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held = ("--images", "40", "--image-size", "16", "--batch-size", "16", "--workers", "1")
    photos = ("--photo-count", "10", "--photo-size", "32", "--photo-batch-size", "4")
    found, text = bench(tmp_path, capsys, "data", *held, *photos, "--label", "random")
    results = found["results"]
    assert results["held"]["images"] == {"sagan_attn": 32, "torchvision": 32}
    assert results["streamed"]["images"] == {"sagan_attn": 8, "timm, random crop": 8, "timm, resize": 8}
    assert all(rate["median"] > 0 for part in results.values() for rate in part["images_per_second"].values())
    assert results["held"]["speed_over"]["torchvision"] > 0
    assert "streamed: timm, resize" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "the following arguments are required: <bench>"),
        (["bench", "blocks"], "invalid choice: 'blocks'"),
        (["bench", "block", "--shapes", "8,64,8"], "'8,64,8' must be <batch>,<channels>,<height>x<width>: 8,256,32x32"),
        (["bench", "block", "--shapes", "8,0,8x8"], "'8,0,8x8' must be <batch>,"),
        (["bench", "block", "--peers", "plain,timm"], "unknown peer 'timm'; there are sagan, "),
        (["bench", "block", "--dtypes", "fp32,int8"], "'int8' must be fp32 or bf16"),
        (["bench", "block", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["bench", "block", "--repetitions", "0"], "'0' must be a whole number of at least 1"),
        (["bench", "block", "--seconds", "-1"], "'-1' must be a number of at least 0"),
        (["bench", "block", "--json", "/nowhere/a.json"], "/nowhere/a.json is to be in /nowhere, which is no folder"),
        (["bench", "block", "--plot", "a.txt"], "a.txt must end in .png, .svg or .pdf"),
        (["bench", "scaling", "--sizes", "8"], "--sizes has 1 size: at least two are required"),
        (["bench", "scaling", "--sizes", "8", "big"], "'big' must be a side in pixels or <height>x<width>"),
        (["bench", "step", "--preset", "vgg"], "unknown preset 'vgg'; there are cifar-resnet18, "),
        (["bench", "step", "--model", "resnet20"], "--model 'resnet20' needs --at"),
        (["bench", "step", "--model", "resnet20", "--preset", "resnet50"], "exclude each other"),
        (["bench", "step", "--model", "resnet21", "--at", "layer3"], "unknown host 'resnet21'; near names: "),
        (["bench", "step", "--model", "torchvision/fasterrcnn", "--at", "x"], "host 'torchvision/fasterrcnn' with "),
        (["bench", "step", "--model", "resnet20", "--at", "layer9", "--image-size", "8"], "layer9"),
        (["bench", "step", "--at", "layer3"], "at of 4 hosts cannot be the same: name one --preset"),
        (["bench", "step", "--block", "sagen"], "unknown block 'sagen'; did you mean sagan"),
        (["bench", "step", "--options", '{"head": 2}'], "block 'sagan' has no option 'head'"),
        (["bench", "data", "--root", "/nowhere"], "/nowhere"),
        (["bench", "data", "--images", "8", "--batch-size", "16"], "batch_size (16) exceeds the 8 training images"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["block", "scaling", "step", "data"])
def test_a_missing_device_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", name, "--device", "cuda"]) == 2
    assert "device 'cuda' is missing: torch" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cuda = ("--device", "cuda")
    found, _ = bench(tmp_path, capsys, "block", "--shapes", "2,128,8x8", "--peers", "plain,flex", *cuda)
    assert found["machine"]["gpu"]
    assert "plain" in found["cases"][1]["peers"]
    tiny = ("--model", "resnet20", "--at", "layer3", "--image-size", "32", "--batch-size", "4")
    found, _ = bench(tmp_path, capsys, "step", *tiny, "--precision", "bf16", *cuda)
    assert found["cases"][0]["kernels_of_a_step"]["grafted"] > found["cases"][0]["kernels_of_a_step"]["host"] > 0
    held = ("--images", "64", "--batch-size", "16", "--photo-count", "8", "--photo-batch-size", "4")
    found, _ = bench(tmp_path, capsys, "data", *held, *cuda)
    assert found["results"]["training"]["busy"] > 0
