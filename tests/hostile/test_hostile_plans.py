"""Folders of ablations from elsewhere: plans that were changed, links out of the folder, names that lead elsewhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from canary import Canary
from safetensors.numpy import save_file
from small_runs import CONFIGS

from sagan_attn.__main__ import main
from sagan_attn.ablation.cell import main as cell_main
from sagan_attn.ablation.cell import run_cell
from sagan_attn.ablation.plan import frozen
from sagan_attn.ablation.runner import Workers, run_cells
from sagan_attn.ablation.spec import Spec, read_spec
from sagan_attn.ablation.store import FAILED, Store, pack_logits, read_logits, read_plan, read_results
from sagan_attn.errors import ConfigError
from sagan_attn.training.class_paths import check_file

KEY = "0123456789abcdef"
CELL = {"key": KEY, "stage": "confirm", "budget": 1, "variant": "sagan", "seed": 1000, "added": False}


def variant(config: dict[str, Any]) -> dict[str, Any]:
    numbers = {"parameters": 1, "flops": 1, "images": 1, "epochs_factor": 1.0}
    words = {"label": "sagan", "kind": "baseline", "baseline": "sagan", "note": ""}
    return {**words, **numbers, "settings": {}, "config": config, "data": {"fit": "a", "test": "b"}, "of": []}


def plan_of(spec: Spec) -> dict[str, Any]:
    stage = {"seeds": [1000], "budgets": [1], "set": {}, "variants": ["sagan"]}
    made = {"format": 1, "name": "x", "spec": spec.text, "base": spec.base, "set": {}, "stages": {"confirm": stage}}
    return json.loads(json.dumps({**made, "variants": {"sagan": variant(spec.base)}, "cells": [CELL]}))


@pytest.fixture
def own(tmp_path: Path, canary: Canary) -> Spec:
    """The user's spec, whose base has a callback of their own, which takes a callable of their own."""
    base = yaml.safe_load((CONFIGS / "lookup.yaml").read_text())
    base["trainer"]["callbacks"] = [
        {"class_path": "my.Callback", "init_args": {"do": "my.function", "deep": {"more": ["my.other"]}, "often": 3}}
    ]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "axes": {"block": ["sagan", "biggan"]}}))
    return read_spec(tmp_path / "spec.yaml")


def in_config(change: Callable[[dict[str, Any], Canary], Any]) -> Callable[[dict[str, Any], Canary], Any]:
    return lambda plan, canary: change(plan["variants"]["sagan"]["config"], canary)


def own_callback(config: dict[str, Any]) -> dict[str, Any]:
    return config["trainer"]["callbacks"][0]["init_args"]


CHANGED: dict[str, tuple[Callable[[dict[str, Any], Canary], Any], str]] = {
    "a callback": (
        in_config(lambda config, c: config["trainer"]["callbacks"].append({"class_path": c.bomb})),
        "sagan: trainer.callbacks.1.class_path names 'canary_in_a_mine.Bomb'",
    ),
    "data": (in_config(lambda config, c: config.update(data={"class_path": c.bomb})), "sagan: data.class_path names"),
    "an argument of the user's callback": (
        in_config(lambda config, c: own_callback(config).update(do=c.boom)),
        "callbacks.0.init_args.do is 'canary_in_a_mine.boom', which stands nowhere in your own config",
    ),
    "deep in an argument": (
        in_config(lambda config, c: own_callback(config).update(deep={"more": [c.boom]})),
        "callbacks.0.init_args.deep is {.*}, which stands nowhere in your own config",
    ),
    "another argument of it": (
        in_config(lambda config, c: own_callback(config).update(other="LambdaCallback")),
        "callbacks.0.init_args.other is 'LambdaCallback', which stands nowhere",
    ),
    "settings of a stage": (
        lambda plan, c: plan["stages"]["confirm"]["set"].update({"trainer.profiler": c.bomb}),
        "sagan: trainer.profiler names 'canary_in_a_mine.Bomb'",
    ),
    "a config's section": (in_config(lambda config, c: config.update(config="x.yaml")), "config is no part"),
    "a text of YAML": (
        in_config(lambda config, c: config["model"].update(optimizer={"options": {"x": f"class_path: {c.bomb}"}})),
        "model.optimizer.options.x is a text that names a class",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_plan_is_refused_before_anything_of_it_is_used(case: str, own: Spec, canary: Canary, tmp_path: Path):
    store, (change, named) = Store(tmp_path / "results"), CHANGED[case]
    plan = plan_of(own)
    store.write(store.plan, plan)
    assert frozen(store, own, {}) == plan  # what the user's own config names is theirs
    change(plan, canary)
    store.write(store.plan, plan)
    with pytest.raises(ConfigError, match=named) as error:
        frozen(store, own, {})
    assert str(store.plan) in str(error.value)
    assert "the plan was changed since it was made" in str(error.value)
    assert canary.sang == []


def test_the_command_refuses_a_changed_plan(
    own: Spec, canary: Canary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, plan = tmp_path / "results", plan_of(own)
    plan["variants"]["sagan"]["config"]["trainer"]["callbacks"] = [{"class_path": canary.bomb}]
    Store(folder).write(folder / "plan.json", plan)
    for more in ([], ["--dry-run"], ["--stage", "confirm"], ["--add-seeds", "1"]):
        assert main(["ablate", str(own.path), "--folder", str(folder), *more]) == 2
        assert "trainer.callbacks.0.class_path names 'canary_in_a_mine.Bomb'" in capsys.readouterr().err
    assert canary.sang == []
    assert not (folder / "cells").exists()


SHAPES: list[Callable[[dict[str, Any]], Any]] = [
    lambda plan: plan.pop("stages"),
    lambda plan: plan.update(stages=[]),
    lambda plan: plan["stages"].update(confirm={}),
    lambda plan: plan["stages"]["confirm"].update(set="{trainer.logger: 1}"),
    lambda plan: plan["stages"]["confirm"].update(variants=["none"]),
    lambda plan: plan["stages"]["confirm"].update(variants=[["sagan"]]),
    lambda plan: plan["stages"]["confirm"].update(variants={"sagan": 1}),
    lambda plan: plan["variants"]["sagan"].update(config="../../config.yaml"),
    lambda plan: plan["variants"]["sagan"].update(epochs_factor="2"),
    lambda plan: plan["variants"]["sagan"].pop("data"),
    lambda plan: plan.update(variants={"sagan": []}),
    lambda plan: plan.update(cells=[{**CELL, "budget": "1"}]),
    lambda plan: plan.update(cells=[{**CELL, "stage": "../.."}]),
    lambda plan: plan.update(cells=[{**CELL, "variant": ["sagan"]}]),
    lambda plan: plan.update(cells=[{**CELL, "seed": None}]),
    lambda plan: plan["variants"]["sagan"].update(config={"data": {}}),
    lambda plan: plan["variants"]["sagan"]["config"].update(trainer=[]),
]


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_a_plan_of_another_shape_is_refused(case: int, own: Spec, tmp_path: Path):
    store, plan = Store(tmp_path / "results"), plan_of(own)
    SHAPES[case](plan)
    store.write(store.plan, plan)
    with pytest.raises(ConfigError, match=r"plan.json") as error:
        frozen(store, own, {})
    assert str(store.plan) in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["../../../x", "0123456789abcde/", "0123456789ABCDEF", "..", "", "0" * 17, "a\0bcdef012345678", 5, None, ["a"]],
)
def test_keys_lead_nowhere(key: Any, own: Spec, tmp_path: Path):
    store, plan = Store(tmp_path / "results"), plan_of(own)
    plan["cells"] = [{**CELL, "key": key}]
    store.write(store.plan, plan)
    with pytest.raises(ConfigError, match=r"plan.json is not the plan of an ablation"):
        read_plan(store.folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 200_000, "cannot be read: .*recursion"),
        ('{"a":' * 200_000, "cannot be read: .*recursion"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"format": 1, "cells": ' + "[" * 100 + "]" * 100 + ', "variants": {}}', ".* is no cell"),
        ('{"format": NaN}', "has format nan"),
        ("null", "holds no mapping"),
    ],
)
def test_absurd_json_is_refused(text: str, match: str, own: Spec, tmp_path: Path):
    store = Store(tmp_path / "results")
    store.folder.mkdir()
    store.plan.write_text(text)
    with pytest.raises(ConfigError, match=f"plan.json {match}"):
        read_plan(store.folder)
    store.write(store.plan, plan_of(own))
    (store.folder / "cells" / KEY).mkdir(parents=True)
    store.file(KEY, "result.json").write_text(text)
    results, _, problems = read_results(store.folder)
    assert results == []
    assert str(store.file(KEY, "result.json")) in problems[0]


def test_files_of_absurd_sizes_are_not_read(own: Spec, tmp_path: Path):
    store = Store(tmp_path / "results")
    store.write(store.plan, plan_of(own))
    os.truncate(store.plan, 10**11)  # a sparse file takes no room
    with pytest.raises(ConfigError, match=r"plan.json cannot be read: it has more than 100,000,000 bytes"):
        read_plan(store.folder)
    header = 2**40
    store.cell(KEY).mkdir(parents=True)
    logits = store.file(KEY, "logits.safetensors")
    for content in (
        header.to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}" + b"\0" * 100,
        _header({"val/logits": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}),
        _header({"val/logits": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}) + b"\0" * 4,
        _header({"val/logits": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "x": 1}),
        _header({"val/logits": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2]}}) + b"\0" * 2,
        _header({"val/logits": {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [0, 1]}}) + b"\0",
        b"[" * 1000,
    ):
        logits.write_bytes(content)
        with pytest.raises(ConfigError, match=r"logits.safetensors is damaged"):
            read_logits(store.folder, KEY, "val")


def test_logits_are_those_that_were_written(tmp_path: Path):
    store, path = Store(tmp_path), Store(tmp_path).file(KEY, "logits.safetensors")
    store.cell(KEY).mkdir(parents=True)
    logits, labels = np.arange(6, dtype=np.float16).reshape(3, 2), np.arange(3)
    whole = pack_logits({"val/logits": logits, "val/labels": labels})
    path.write_bytes(whole)
    read = read_logits(store.folder, KEY, "val")
    assert read is not None
    assert (read[0] == logits).all()
    assert (read[1] == labels).all()
    assert read_logits(store.folder, KEY, "test") is None
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(
        ConfigError, match=r"logits.safetensors is damaged: its sha256 is [0-9a-f]{64}, [0-9a-f]{64} is"
    ):
        read_logits(store.folder, KEY, "val")
    save_file({"val/logits": logits, "val/labels": labels}, path)  # as written before there was a digest
    assert read_logits(store.folder, KEY, "val") is not None
    for other in (
        {"val/logits": logits.astype(np.float32)},
        {"val/logits": logits[0]},
        {"val/labels": labels[:2]},
        {"val/labels": labels.astype(np.float16)},
    ):
        path.write_bytes(pack_logits({"val/logits": logits, "val/labels": labels, **other}))
        with pytest.raises(ConfigError, match=r"logits.safetensors is damaged: it has logits"):
            read_logits(store.folder, KEY, "val")


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.fixture
def linked(own: Spec, tmp_path: Path) -> tuple[Store, Path]:
    """A folder whose plan is the user's, and a folder of theirs that links may lead to."""
    store, mine = Store(tmp_path / "results"), tmp_path / "home"
    store.write(store.plan, plan_of(own))
    mine.mkdir()
    (mine / ".profile").write_text("export A=1\n")
    return store, mine


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["log.txt", "attempts", "lock"])
@pytest.mark.parametrize("target", [".profile", "new"])
def test_nothing_is_appended_through_a_link(name: str, target: str, linked: tuple[Store, Path]):
    """`log.txt -> ~/.profile` would be given all that a cell prints."""
    store, mine = linked
    before = contents(mine)
    store.cell(KEY).mkdir(parents=True)
    store.file(KEY, name).symlink_to(mine / target)
    with pytest.raises(ConfigError, match=rf"{name} is no plain file"):
        run_cells(store, [dict(CELL)], Workers(), lambda line: None)
    with pytest.raises(ConfigError, match=rf"{name} is no plain file"):
        cell_main(str(store.folder), KEY, 1, {}, str(store.file(KEY, "log.txt")))
    assert contents(mine) == before


def test_a_cells_folder_is_no_link(linked: tuple[Store, Path]):
    """What a killed attempt left there, files with a dot in front, was removed."""
    store, mine = linked
    (store.folder / "cells").mkdir()
    store.cell(KEY).symlink_to(mine)
    before = contents(mine)
    with pytest.raises(ConfigError, match=f"{KEY} is a link: take it away"):
        run_cells(store, [dict(CELL)], Workers(), lambda line: None)
    with pytest.raises(ConfigError, match="is a link"):
        cell_main(str(store.folder), KEY, 1, {}, str(store.file(KEY, "log.txt")))
    with pytest.raises(ConfigError, match="is a link"):
        store.write_config(KEY, {})
    assert contents(mine) == before


@pytest.mark.parametrize("name", ["log.txt", "attempts", "lock"])
def test_a_pipe_is_not_waited_for(name: str, linked: tuple[Store, Path]):
    store, _ = linked
    store.cell(KEY).mkdir(parents=True)
    os.mkfifo(store.file(KEY, name))
    with pytest.raises(ConfigError, match=rf"{name} is no plain file"):
        run_cells(store, [dict(CELL)], Workers(), lambda line: None)


def test_what_is_swept_away_is_litter_of_this_library_alone(linked: tuple[Store, Path]):
    store, _ = linked
    store.cell(KEY).mkdir(parents=True)
    for name in (".keep", ".0123.sagan_attn.part"):
        store.file(KEY, name).touch()
    store.sweep(KEY)
    assert [path.name for path in store.cell(KEY).iterdir()] == [".keep"]


def test_results_are_replaced_and_not_written_through_a_link(linked: tuple[Store, Path]):
    store, mine = linked
    store.cell(KEY).mkdir(parents=True)
    store.file(KEY, "result.json").symlink_to(mine / ".profile")
    store.write(store.file(KEY, "result.json"), {"a": 1})
    assert not store.file(KEY, "result.json").is_symlink()
    assert contents(mine) == {".profile": "export A=1\n"}


@pytest.mark.parametrize("name", ["report", "report/figures", "report/paper"])
def test_a_report_is_not_written_into_a_linked_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from fake_results import make

    folder = make({"none": 0.0, "sagan": 0.02}, controls=(), seeds=2).write(tmp_path / "ablation")
    monkeypatch.setattr("sagan_attn.ablation.report.figures.draw", lambda analysis: {"forest-confirm": None})
    monkeypatch.setattr("sagan_attn.ablation.report.figures.image_files", lambda figure: {"svg": b"x", "png": b"x"})
    mine = tmp_path / "home"
    mine.mkdir()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(mine)
    assert main(["report", str(folder), "--paper"]) == 2
    assert f"{folder / name} is a link: take it away" in capsys.readouterr().err
    assert contents(mine) == {}


def test_a_class_of_the_users_own_does_run(own: Spec, canary: Canary, tmp_path: Path):
    """Named in the base that they give: the cell's config, a file in the folder of an ablation, names it too."""
    base = {**own.base, "trainer": {**own.base["trainer"], "max_epochs": 1, "callbacks": [{"class_path": canary.bomb}]}}
    base["data"] = {"class_path": "LookupData", "init_args": {"n_train": 32, "n_val": 8, "n_test": 8, "batch_size": 8}}
    base["model"]["schedule"] = {"warmup_epochs": 0}
    own.path.with_name("base.yaml").write_text(yaml.safe_dump(base))
    spec, store = read_spec(own.path), Store(tmp_path / "results")
    store.write(store.plan, plan_of(spec))
    assert frozen(store, spec, {})
    assert canary.sang == []
    assert run_cell(store.folder, KEY) == FAILED  # the plan here knows no fingerprints of the data
    assert "the fit images have changed" in store.file(KEY, "failure.json").read_text()
    assert canary.sang == ["imported", "made"]
    with pytest.raises(ConfigError, match=r"config.yaml: trainer.callbacks.0.class_path names"):
        check_file(store.file(KEY, "config.yaml"))
