"""What a notebook shows of sites, grafts and runs: an aligned table of plain text, made without running the model."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosts import HOSTS
from torch import nn

from sagan_attn import Site, graft, grafts_of, sites, summary
from sagan_attn.commands.sites import NUMBERS
from sagan_attn.surgery.sites import Sites
from sagan_attn.surgery.text import short_number, text_table
from sagan_attn.training import Run, load_run
from sagan_attn.training.data import Preprocess

IMAGE = torch.zeros(1, 3, 32, 32)
HOSTILE = "a\x1b[2Jb\u202e\n\rc"


def tiny() -> nn.Module:
    return HOSTS["tiny"].build()


def cells(line: str) -> list[str]:
    """What stands in a line between gaps of two spaces and more."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def never(*_: object) -> None:
    raise AssertionError("the model was run")


def test_sites():
    found = sites(tiny(), IMAGE)
    head, columns, *rows = repr(found).splitlines()
    assert head == f"{len(found)} sites"
    assert cells(columns) == ["name", *NUMBERS]
    assert [cells(row)[0] for row in rows] == [site.name for site in found]
    top = next(site for site in found if site.name == "top")
    row = cells(rows[found.index(top)])
    assert row[1:6] == ["16", "8 x 8", "NCHW", "1", "341"]
    assert row[6:] == [short_number(top.flops), f"{top.flops_share:.2%}", short_number(top.map_bytes or 0)]
    assert len({len(line) for line in [columns, *rows]}) == 1  # the last column ends where the others do
    assert repr(sites(tiny(), IMAGE, max_map_bytes=1)) == "no sites"
    assert repr(found[:1]).startswith("1 site\n")


def test_sites_are_a_list():
    found = sites(tiny(), IMAGE)
    plain = list(found)
    assert found == plain
    assert isinstance(found[0], Site)
    assert "parameters" in str(found[0])
    assert "\n" not in str(found[0])
    for same in (found[:], copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(same) is Sites
        assert same == plain
    assert found[::2] == plain[::2]
    assert type(found[1:]) is Sites
    assert sites(tiny(), IMAGE, max_map_bytes=1) == []


def test_a_long_table_loses_its_middle():
    site = sites(tiny(), IMAGE)[0]
    many = Sites(
        Site(f"layer{i}", *(getattr(site, name) for name in list(site.__match_args__)[1:])) for i in range(500)
    )
    lines = repr(many).splitlines()
    assert lines[0] == "500 sites"
    assert [line.split()[0] for line in lines[2:17]] == [f"layer{i}" for i in range(15)]
    assert lines[17] == "... 470 more ..."
    assert [line.split()[0] for line in lines[18:]] == [f"layer{i}" for i in range(485, 500)]
    assert "more" not in repr(many[:30])
    assert "... 1 more ..." in repr(many[:31])


def test_grafts():
    model = tiny()
    grafts = graft(model, ["stage", "top"], example_input=IMAGE)
    graft(model, "top", block="multihead", example_input=IMAGE)
    grafts[1].block.key.bias.requires_grad_(False)
    model.forward = never
    head, columns, *rows = repr(grafts_of(model)).splitlines()
    assert head == "3 grafts: 1,456 parameters"
    assert cells(columns) == ["name", "site", "block", "parameters", "trainable", "gamma"]
    assert [cells(row) for row in rows] == [
        ["sagan", "stage", "SelfAttention2d", "91", "91", "0"],
        ["sagan", "top", "SelfAttention2d", "341", "339", "0"],
        ["multihead", "top", "MultiHeadAttention2d", "1,024", "1,024"],
    ]
    head, _, *two = repr(grafts).splitlines()
    assert head == "2 grafts: 432 parameters"
    assert [cells(row) for row in two] == [cells(row) for row in rows[:2]]
    with grafts[:1].disabled():
        assert [cells(row)[-1] for row in repr(grafts).splitlines()[2:]] == ["off", "0"]
    assert repr(summary(model)) == str(summary(model))
    assert str(summary(model)).splitlines()[2:] == [columns, *rows]
    grafts[:1].remove()
    assert [cells(row)[-1] for row in repr(grafts).splitlines()[2:]] == ["removed", "0"]
    assert repr(grafts[:0]) == "no grafts"
    assert repr(grafts_of(model.to("meta"))).splitlines()[2].split() == [
        "sagan",
        "top",
        "SelfAttention2d",
        "341",
        "339",
    ]


CLASSES = [f"class {number}" for number in range(37)]


def test_a_run(small_run: Path):
    run = load_run(small_run)
    run.model.forward = never
    assert "37: class 0, class 1, class 2, class 3, class 4, ...\n" in repr(replace(run, classes=CLASSES)).replace(
        " " * 4, ""
    )
    lines = repr(run).splitlines()
    assert [cells(line) for line in lines[:6]] == [
        ["run", str(small_run)],
        ["host", "lookup-cnn"],
        ["data", "LookupData"],
        ["epochs", "2"],
        ["input", "3 x 48 x 48"],
        ["classes", "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"],
    ]
    assert lines[6:] == str(summary(run.model)).splitlines()
    assert lines[7].startswith("1 graft: 20,641 parameters")


@pytest.mark.parametrize("config", [{}, {"model": 3, "data": [], "trainer": {"max_epochs": HOSTILE}}])
def test_names_from_files_do_not_reach_the_terminal(config: dict):
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Conv2d(3, 8, 1))
    grafts = graft(model, HOSTILE, example_input=IMAGE)
    run = Run(Path(HOSTILE), model, [HOSTILE, "x" * 10_000_000], Preprocess(32), config)
    for shown in (repr(sites(model, IMAGE)), repr(grafts), repr(summary(model)), repr(run)):
        assert all(letter.isprintable() or letter == "\n" for letter in shown)
        assert max(map(len, shown.splitlines())) < 200


def test_text_table():
    assert text_table({"a": "<", "b": ">"}, [["x", "1"], ["yyy", "20,000"]]) == "a         b\nx         1\nyyy  20,000"
    assert text_table({"a": "<", "": "<"}, [["x", ""], ["y", "off"]]) == "a\nx\ny  off"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (999, "999"),
        (999.4e3, "999 k"),
        (999_600, "1 M"),
        (12_345_678, "12.3 M"),
        (2e9, "2 G"),
        (5e13, "50 T"),
    ],
)
def test_short_numbers(value: float, words: str):
    assert short_number(value) == words
    assert short_number(value, "FLOPs").endswith("FLOPs")
    assert short_number(12_000, "FLOPs") == "12 kFLOPs"
