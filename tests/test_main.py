"""`python -m sagan_attn`, mostly in this process."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from sagan_attn import sites
from sagan_attn.__main__ import COMMANDS, main


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["sites", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_table(capsys: pytest.CaptureFixture[str]):
    assert main(["sites", "resnet18", "--image-size", "64x96"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sagan", "in", "resnet18,", "one", "image", "of", "64", "x", "96"]
    header = "name channels H x W layout calls parameters FLOPs of the host's map bytes"
    assert " ".join(lines[1].split()) == header
    (layer3,) = (line.split() for line in lines if line.startswith("layer3 "))
    site = {s.name: s for s in sites(timm.create_model("resnet18"), torch.zeros(1, 3, 64, 96))}["layer3"]
    assert layer3[:7] == ["layer3", "256", "4", "x", "6", "NCHW", "1"]
    assert layer3[7] == f"{site.parameters:,}" == "82,241"
    assert layer3[8:10] == [f"{site.flops / 1e6:.3g}", "M"]
    assert layer3[10] == f"{site.flops_share:.2%}"
    assert layer3[11:] == [f"{4 * 24 * 24 / 1e3:.3g}", "k"]
    names = [line.split()[0] for line in lines[2:-1]]
    assert "layer3.1" not in names  # the same place as layer3
    assert "layer3.1.aa" not in names  # an identity
    assert lines[-1] == f"resnet18 itself: 11,689,512 parameters, 445 MFLOPs; {len(names)} of {len(names)} places shown"


def test_json_is_what_sites_says(capsys: pytest.CaptureFixture[str]):
    found = listed(
        capsys, "timm/convnext_atto", "--image-size", "64", "--all", "--block", "nonlocal", "--options", '{"pool": 2}'
    )
    expected = sites(
        timm.create_model("convnext_atto"), torch.zeros(1, 3, 64, 64), block="nonlocal", options={"pool": 2}
    )
    assert found == [{**vars(site), "positions": site.positions} for site in expected]


def test_sort_budget_and_limit(capsys: pytest.CaptureFixture[str]):
    small = ("resnet18", "--image-size", "64")
    everything = listed(capsys, *small)
    cheap = listed(capsys, *small, "--max-flops-share", "0.01", "--max-map-bytes", "1e4", "--sort", "flops")
    assert cheap == sorted(
        (s for s in everything if s["flops_share"] <= 0.01 and s["map_bytes"] <= 1e4), key=lambda s: s["flops"]
    )
    assert 3 < len(cheap) < len(everything)
    assert listed(capsys, *small, "--limit", "3") == everything[:3]
    assert len(listed(capsys, *small, "--all")) > len(everything)


def test_other_hosts(capsys: pytest.CaptureFixture[str]):
    assert "relu" in {s["name"] for s in listed(capsys, "torchvision/resnet18", "--image-size", "32")}
    assert "layer3" in {s["name"] for s in listed(capsys, "resnet20", "--image-size", "32")}  # the CIFAR one
    found = listed(
        capsys,
        "swin_tiny_patch4_window7_224",
        *("--image-size", "64", "--model-options", '{"img_size": 64, "window_size": 2}'),
    )
    assert {s["name"]: s["layout"] for s in found}["layers.1"] == "NHWC"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "resnet5O"], "near names in timm: resnet50"),
        (["sites", "hub/resnet50"], "the part before the slash must be torchvision or timm"),
        (["sites", "resnet18", "--model-options", '{"widht": 1}'], "model 'resnet18' with options {'widht': 1} is ref"),
        (["sites", "resnet18", "--block", "sagen"], "unknown block 'sagen'; did you mean sagan"),
        (["sites", "resnet18", "--options", '{"head": 2}'], "block 'sagan' has no option 'head'"),
        (["sites", "resnet18", "--options", "pool=2"], "'pool=2' is no JSON"),
        (["sites", "resnet18", "--options", "[2]"], "'[2]' must be a JSON object"),
        (["sites", "resnet18", "--image-size", "big"], "'big' must be a side in pixels or <height>x<width>"),
        (["sites", "resnet18", "--image-size", "0x7"], "'0x7' must be a side in pixels"),
        (["sites", "resnet18", "--image-size", "1x2x3"], "'1x2x3' must be a side in pixels"),
        (["sites", "swin_tiny_patch4_window7_224", "--image-size", "64"], "does not take images of 64 x 64: "),
        (["sites", "resnet18", "--limit", "0"], "'0' must be a whole number of at least 1"),
        (["sites", "resnet18", "--max-flops-share", "-1"], "max_flops_share (-1.0) must be a number above 0"),
        (["sites", "resnet18", "--sort", "cost"], "argument --sort: invalid choice: 'cost'"),
        (["sites"], "the following arguments are required: model"),
        (["site"], "invalid choice: 'site'"),
        ([], "the following arguments are required: <command>"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"{command} [-h]" in capsys.readouterr().out


def test_as_a_program():
    run = [sys.executable, "-m", "sagan_attn", "sites", "resnet18", "--block", "nope"]
    answer = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: unknown block 'nope'")
    assert answer.stderr.count("\n") == 1
