"""From a spec to results: plans, keys, real cells, and the command."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sagan_attn.__main__ import main
from sagan_attn.ablation.cell import run_cell
from sagan_attn.ablation.plan import add_seeds, freeze, frozen, new_plan
from sagan_attn.ablation.spec import read_spec
from sagan_attn.ablation.stages import add_confirm, cells_of
from sagan_attn.ablation.store import BUSY, DONE, FAILED, Store, read_logits, read_results
from sagan_attn.errors import ConfigError, SaganAttnError

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "data.init_args.n_train": 128,
    "data.init_args.n_val": 33,  # a last batch of one image
    "data.init_args.n_test": 32,
    "data.init_args.batch_size": 32,
    "trainer.accelerator": "cpu",
}
CONFIRM = {"confirm": {"seeds": 6, "epochs": [1, 2]}}


def write_spec(folder: Path, **changes: Any) -> Path:
    content = {
        "base": str(CONFIGS / "lookup.yaml"),
        "set": SMALL,
        "axes": {"block": ["sagan", "nonlocal"]},
        "controls": ["context-max"],
        **CONFIRM,
        **changes,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """A plan in its folder."""
    folder = tmp_path_factory.mktemp("ablation")
    store, plan = Store(folder / "results"), new_plan(read_spec(write_spec(folder)), {})
    freeze(store, plan)
    return store, plan


def cell_of(plan: dict[str, Any], variant: str, budget: int = 1, seed: int = 1000) -> dict[str, Any]:
    (cell,) = [c for c in plan["cells"] if (c["variant"], c["budget"], c["seed"]) == (variant, budget, seed)]
    return cell


def test_the_plan(planned: tuple[Store, dict[str, Any]], tmp_path: Path):
    _, plan = planned
    assert len(plan["cells"]) == 4 * 6 * 2 == len({cell["key"] for cell in plan["cells"]})
    # the host: patches 3*4*4*64 + 128, local 64*128*9 + 256, mixes 2 * (128*128 + 256), head 1290
    assert plan["variants"]["none"]["parameters"] == 3072 + 128 + 73728 + 256 + 2 * (16384 + 256) + 1290
    assert plan["variants"]["sagan"]["parameters"] - 111_754 == 2 * (128 * 16 + 16) + 128 * 128 + 128 + 1
    # other spellings of the same are the same
    settings = {key: float(value) if isinstance(value, int) else value for key, value in SMALL.items()}
    settings = dict(reversed(settings.items())) | {"data.init_args.num_workers": 2}
    same = new_plan(read_spec(write_spec(tmp_path, set=settings | SMALL, axes={"block": ["nonlocal", "sagan"]})), {})
    assert {cell["key"] for cell in same["cells"]} == {cell["key"] for cell in plan["cells"]}
    # another image is another key
    other = new_plan(read_spec(write_spec(tmp_path, set={**SMALL, "data.init_args.data_seed": 1})), {})
    assert not {cell["key"] for cell in other["cells"]} & {cell["key"] for cell in plan["cells"]}


@pytest.mark.slow
def test_a_frozen_plan_is_not_changed(planned: tuple[Store, dict[str, Any]], tmp_path: Path):
    store, plan = planned
    spec = read_spec(write_spec(tmp_path))
    assert frozen(store, spec, {}) == json.loads(json.dumps(plan))
    with pytest.raises(ConfigError, match="with another set than"):
        frozen(store, spec, {"lr": 1})
    with pytest.raises(ConfigError, match=r"with another spec than.*--add-seeds"):
        frozen(store, read_spec(write_spec(tmp_path, expected_sd=0.1)), {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="holds other files and no ablation"):
        frozen(Store(tmp_path / "other"), spec, {})
    more = json.loads(json.dumps(plan))
    add_seeds(more, spec, 2)
    added = [cell for cell in more["cells"] if cell["added"]]
    assert sorted({cell["seed"] for cell in added}) == [1006, 1007]
    assert len(added) == 4 * 2 * 2
    assert more["cells"][: len(plan["cells"])] == plan["cells"]
    assert not add_seeds(more, spec, 2)  # the same command goes on with these
    assert add_seeds(more, spec, 2, [cell["key"] for cell in more["cells"]])
    assert more["stages"]["confirm"]["added_seeds"] == [1006, 1007, 1008, 1009]


REFUSED: dict[str, dict[str, Any]] = {
    "are the same training run.*num_workers changes nothing": {
        "variants": {"slow": {"block": "sagan", "data.init_args.num_workers": 1}}
    },
    "'a' and 'sagan' are the same training run": {"variants": {"a": {"block": "sagan"}}},
    "a: .*does not accept option 'model.widht'": {"variants": {"a": {"model.widht": 3}}},
    "a: .*heads": {"variants": {"a": {"heads": 3}}},
    "a: unknown block 'sagann'; did you mean sagan": {"variants": {"a": {"block": "sagann"}}},
    r"a: .*\[\]": {"variants": {"a": {"block": []}}},
    "needs validation images": {"set": {**SMALL, "data.init_args.n_val": 0}},
    r"n_train \(-1\)": {"set": {**SMALL, "data.init_args.n_train": -1}},
    "names 'x'; there are 'none'": {"confirm": {"seeds": 6, "choose": ["x"]}},
}


SELDOM = ("num_workers", "n_train", "heads")


@pytest.mark.parametrize(
    "message",
    [pytest.param(m, marks=pytest.mark.slow if any(word in m for word in SELDOM) else ()) for m in REFUSED],
)
def test_refused_before_anything_runs(tmp_path: Path, message: str):
    with pytest.raises(SaganAttnError, match=message):
        new_plan(read_spec(write_spec(tmp_path, **REFUSED[message])), {})


@pytest.fixture(scope="module")
def computed(planned: tuple[Store, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results of the first seed."""
    store, plan = planned
    for variant in ("none", "sagan", "context-max"):
        assert run_cell(store.folder, cell_of(plan, variant)["key"], 1) == DONE
    results, failures, problems = read_results(store.folder)
    assert not failures
    assert not problems
    return {result["variant"]: result for result in results}


def test_results(planned: tuple[Store, dict[str, Any]], computed: dict[str, dict[str, Any]]):
    store, plan = planned
    for name, result in computed.items():
        metrics = result["metrics"]
        for split, images in (("val", 33), ("test", 32)):
            logits, labels = read_logits(store.folder, result["key"], split)  # type: ignore[misc]
            assert len(labels) == images
            assert metrics[f"{split}/accuracy"] == pytest.approx(np.mean(logits.argmax(1) == labels), abs=1 / images)
            shifted = logits.astype(float) - logits.max(1, keepdims=True)
            picked = shifted[np.arange(images), labels] - np.log(np.exp(shifted).sum(1))
            assert metrics[f"{split}/loss"] == pytest.approx(-picked.mean(), abs=2e-3)
        assert result["curves"][-1]["val/accuracy"] == pytest.approx(metrics["val/accuracy"])
        assert result["cost"]["parameters"] == plan["variants"][name]["parameters"]
        knocked = result["knockouts"]
        assert (
            set(knocked)
            == {
                "none": set(),
                "context-max": {"as_trained", "disabled"},
                "sagan": {"as_trained", "disabled", "uniform", "other_image"},
            }[name]
        )
        if knocked:
            assert knocked["as_trained"] == metrics["val/accuracy"]
            ((share,),) = (list(one.values()) for one in result["evidence"].values())
            assert 0 < share < 1
    assert {path.name for path in store.cell(computed["none"]["key"]).iterdir()} == {
        *("attempts", "config.yaml", "lock", "logits.safetensors", "metrics.csv", "result.json")
    }


def test_a_cell_is_a_fit(planned: tuple[Store, dict[str, Any]], computed: dict[str, dict[str, Any]], tmp_path: Path):
    """Alone or in a sweep: the same numbers."""
    from sagan_attn.training.cli import main as train

    store, _ = planned
    result = computed["sagan"]
    torch.rand(7)
    config = store.file(result["key"], "config.yaml")
    assert train(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.csv").read_text() == store.file(result["key"], "metrics.csv").read_text()


@pytest.mark.slow
def test_hosts_and_data_are_told_apart(tmp_path: Path):
    hosts = [{"name": "lookup-cnn", "options": {"width": width}} for width in (32, 64)]
    plan = new_plan(read_spec(write_spec(tmp_path, axes={"host": hosts}, controls=["conv"])), {})
    baselines = {name: one["baseline"] for name, one in plan["variants"].items() if one["kind"] == "variant"}
    assert baselines == {f"host lookup-cnn width={width}": f"none, host lookup-cnn width={width}" for width in (32, 64)}
    for name, baseline in baselines.items():
        ours, theirs = (plan["variants"][each]["config"]["model"]["host"] for each in (name, baseline))
        assert ours == theirs
    data = [{"class_path": "LookupData", "init_args": {"n_train": n, "n_val": 32, "n_test": 32}} for n in (64, 128)]
    plan = new_plan(read_spec(write_spec(tmp_path, set={}, axes={"data": data})), {})
    assert [one["images"] for one in plan["variants"].values()] == [64, 128] * 3


@pytest.mark.slow
def test_controls_of_the_same_size(tmp_path: Path):
    spec = write_spec(
        tmp_path,
        axes={"block": ["sagan", "biggan", "multihead"], "reduction": [2, 4]},
        exclude=[{"block": "biggan", "reduction": 2}, {"block": "biggan", "reduction": 4}],
        controls=["conv", "identity", "wider"],
    )
    plan = new_plan(read_spec(spec), {})
    sizes = {name: one["parameters"] for name, one in plan["variants"].items()}
    host = sizes["none"]
    assert [name for name in sizes if name.startswith("conv")] == ["conv", "conv, like sagan", "conv, like multihead"]
    for block in ("sagan", "multihead"):
        for reduction in (2, 4):
            ours = sizes[f"{block}, reduction {reduction}"] - host
            assert any(abs(sizes[name] - host - ours) <= 0.03 * ours for name in sizes if name.startswith("conv"))
    for reduction in (2, 4):  # the parameters without the attention
        assert sizes[f"identity, reduction {reduction}"] == sizes[f"sagan, reduction {reduction}"]
    assert "% of the parameters of sagan, reduction 2" in plan["variants"]["wider"]["note"]


def test_done_busy_and_changed_data(
    planned: tuple[Store, dict[str, Any]], computed: dict[str, dict[str, Any]], tmp_path: Path
):
    store, plan = planned
    assert run_cell(store.folder, computed["none"]["key"]) == DONE
    assert store.attempts(computed["none"]["key"]) == 1
    key = cell_of(plan, "none", seed=1001)["key"]
    with store.lock(key) as free:
        assert free
        assert run_cell(store.folder, key) == BUSY
    other = Store(tmp_path)
    changed = json.loads(json.dumps(plan))
    changed["variants"]["none"]["data"]["fit"] = "0" * 64
    freeze(other, changed)
    assert run_cell(other.folder, key) == FAILED
    (failure,) = read_results(other.folder)[1]
    assert failure["kind"] == "refused"
    assert "the fit images have changed since the plan was made" in failure["message"]


@pytest.mark.slow
def test_a_full_disk_loses_nothing(planned: tuple[Store, dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    store, plan = planned
    key = cell_of(plan, "none", seed=1002)["key"]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)  # of the result, and of the failure as well
        assert run_cell(store.folder, key, 1) == FAILED
    assert not store.has_result(key)
    assert not store.has_failed(key)
    assert run_cell(store.folder, key, 1) == DONE
    assert store.attempts(key) == 2


@pytest.mark.slow
def test_divergence_is_an_outcome(tmp_path: Path):
    spec = read_spec(write_spec(tmp_path, set={**SMALL, "lr": 1e30}))
    store, plan = Store(tmp_path / "results"), new_plan(spec, {})
    freeze(store, plan)
    assert run_cell(store.folder, cell_of(plan, "sagan")["key"], 1) == DONE
    ((result,), _, problems) = read_results(store.folder)
    assert not problems
    assert result["outcome"] == "diverged"
    assert result["divergence"].startswith("step 1 (epoch 0, batch 1): the loss is nan")  # and there it ended
    assert result["metrics"]["val/accuracy"] is None
    assert result["cost"]["train_seconds"] > 0
    assert not store.file(result["key"], "logits.safetensors").exists()


@pytest.mark.slow
def test_a_lack_of_memory_names_the_graft(planned: tuple[Store, dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    from sagan_attn.blocks import SelfAttention2d

    forward = SelfAttention2d.forward

    def fails(block: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        if block.training and len(x) == SMALL["data.init_args.batch_size"]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5000000000 bytes.")
        return forward(block, x, mask)

    monkeypatch.setattr(SelfAttention2d, "forward", fails)
    store, plan = planned
    key = cell_of(plan, "sagan", seed=1005)["key"]
    assert run_cell(store.folder, key, 1) == FAILED
    failure = json.loads(store.file(key, "failure.json").read_text())
    assert failure["kind"] == "out of memory"
    assert "(asked for 5.0 GB) in training, met in 'local.act.grafts.sagan'" in failure["message"]
    assert "of graft 'sagan' at 'local', on maps of 12 x 12" in failure["message"]


@pytest.mark.slow
def test_the_screen_chooses(tmp_path: Path):
    spec = read_spec(
        write_spec(tmp_path, screen={"seeds": 2, "epochs": [1]}, confirm={"seeds": 6, "epochs": [1, 2], "choose": 1})
    )
    plan = new_plan(spec, {})
    accuracies = {"none": 0.9, "context-max": 0.95, "sagan": 0.5, "nonlocal": 0.4}
    results = [
        {**cell, "outcome": "finished", "metrics": {"val/accuracy": accuracies[cell["variant"]]}}
        for cell in cells_of(plan, "screen")
    ]
    with pytest.raises(ConfigError, match="the screen lacks 1 cells"):
        add_confirm(json.loads(json.dumps(plan)), spec, results[1:])
    results[-1]["metrics"]["val/accuracy"] = 0.99
    again = json.loads(json.dumps(plan))
    assert add_confirm(again, spec, results) == ["nonlocal"]  # 0.695 on average
    assert again["stages"]["confirm"]["variants"] == ["none", "context-max", "nonlocal"]
    results[-1]["outcome"] = "diverged"
    assert add_confirm(plan, spec, results) == ["sagan"]


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", str(write_spec(tmp_path)), "--dry-run", "--set", "lr=0.01", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "confirm: 4 variants x 6 seeds x epochs 1, 2 = 48 cells; smallest effect seen with 80 % power" in out
    assert "132,395" in out
    assert not (tmp_path / "runs").exists()
    for arguments, message in (
        (["--set", "lr"], "KEY=VALUE"),
        (["--set", "x=1"], "unknown key 'x'"),
        (["--set", "lr=[1"], "no YAML"),
    ):
        assert main(["ablate", str(write_spec(tmp_path)), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["ablate", str(write_spec(tmp_path)), "--devices", "99"]) == 2
    assert "CUDA devices" in capsys.readouterr().err


@pytest.mark.slow
def test_every_place_of_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spec = write_spec(tmp_path, screen={"seeds": 2, "epochs": [1]}, confirm={"seeds": 6, "choose": 1})
    assert main(["ablate", str(spec), "--screen-sites", "--dry-run", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for site in ("patches", "local", "mix1", "mix2.conv"):
        assert f"sagan at {site} " in out
    assert "at pool" not in out  # a map of one position
    assert main(["ablate", str(write_spec(tmp_path)), "--screen-sites", "--dry-run"]) == 2
    assert "needs a stage `screen`" in capsys.readouterr().err
