"""Specs: what is read, what is refused before anything runs, and what variants they stand for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sagan_attn.ablation.models import Models
from sagan_attn.ablation.plan import new_plan, with_controls
from sagan_attn.ablation.settings import apply_settings, label
from sagan_attn.ablation.spec import read_spec
from sagan_attn.ablation.variants import make_variants
from sagan_attn.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
LOOKUP = str(CONFIGS / "lookup.yaml")
SPEC: dict[str, Any] = {"base": LOOKUP, "axes": {"block": ["sagan", "biggan"]}}


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    def write(**changes: Any) -> Path:
        content = {key: value for key, value in {**SPEC, **changes}.items() if value is not ...}
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize("name", [path.name for path in sorted((CONFIGS / "ablation").glob("*.yaml"))])
def test_the_shipped_specs(name: str):
    assert len(read_spec(CONFIGS / "ablation" / name).confirm.seeds) == 12


def test_defaults(spec: Any):
    read = read_spec(spec())
    assert read.screen is None
    assert read.confirm.seeds == tuple(range(1000, 1012))
    assert read.confirm.epochs == (1, 2)  # of the base config's 2
    assert read.controls == ("none",)
    with_screen = read_spec(spec(screen={}))
    assert with_screen.screen is not None
    assert with_screen.screen.seeds == (0, 1, 2)
    assert not set(with_screen.screen.seeds) & set(with_screen.confirm.seeds)


REFUSED = {
    "unknown key 'axis'; did you mean 'axes'": {"axis": {}},
    "base is missing": {"base": ...},
    "cannot be read as YAML": {"base": "nothing.yaml"},
    r"base \({'lr': 1}\) must be the path of a training config": {"base": {"lr": 1}},
    "unknown control 'convv'; did you mean 'conv'": {"controls": ["convv"]},
    r"unknown control \['conv'\]": {"controls": [["conv"]]},
    "axes.block has 1 value": {"axes": {"block": ["sagan"]}},
    r"axes.block \('sagan'\) must be a list": {"axes": {"block": "sagan"}},
    "unknown key 'blok'; did you mean 'block'": {"axes": {"blok": ["sagan", "biggan"]}},
    "trainer.max_epochs cannot be set": {"set": {"trainer.max_epochs": 3}},
    "seed_everything cannot be set": {"variants": {"a": {"seed_everything": 3}}},
    "screen: model.host cannot be set for a stage": {"screen": {"set": {"model.host": "x"}}},
    "trainer.max_time cannot be set: a run goes on to its last": {"set": {"trainer.max_time": "00:01:00"}},
    "nothing to compare": {"axes": {}},
    "exclude names heads, which is no axis": {"exclude": [{"heads": 2}]},
    "with 5 seeds the smallest p a sign-flip test can give is 0.0625.*needs at least 6": {"confirm": {"seeds": 5}},
    "seeds 2 are in screen and confirm": {"screen": {"seeds": 3}, "confirm": {"seeds": [2, 4, 5, 6, 7, 8]}},
    r"confirm.seeds \(\[1, 1\]\) must be whole numbers": {"confirm": {"seeds": [1, 1]}},
    r"confirm.epochs \(\[0\]\) must be whole numbers": {"confirm": {"epochs": 0}},
    r"confirm.epochs \(\[True\]\) must be whole": {"confirm": {"epochs": True}},
    "needs a screen to choose by": {"confirm": {"choose": 2}},
    "must be a number of variants": {"screen": {}, "confirm": {"choose": 0}},
    r"screen: unknown key 'choose'": {"screen": {"choose": 1}},
    r"expected_sd \(2\) must be a share": {"expected_sd": 2},
    r"axes \(\[1\]\) must be a mapping": {"axes": [1]},
    r"variants.*3 must be a mapping": {"variants": {"a": 3}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(spec: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        read_spec(spec(**REFUSED[message]))


@pytest.mark.parametrize(
    "text", ["", "- 1", "{", "!!python/object/apply:os.system [true]", "[" * 9999, "base: 2026-99-99"]
)
def test_no_spec(tmp_path: Path, text: str):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"spec\.yaml"):
        read_spec(path)


BASES = {
    r"trainer \(None\) must be a mapping": {"trainer": None},
    r"max_epochs \(0\) must be a whole number": {"trainer": {"max_epochs": 0}},
    r"model.grafts \(\['sagan'\]\) must be a list of mappings": {"model": {"grafts": ["sagan"]}},
    r"model.schedule \(None\) must be a mapping": {"model": {"schedule": None}},
    "trainer.fast_dev_run cannot be set": {"trainer": {"max_epochs": 2, "fast_dev_run": True}},
    "EarlyStopping chooses an epoch": {
        "trainer": {"max_epochs": 2, "callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}
    },
}


@pytest.mark.parametrize("message", BASES)
def test_a_base_that_is_no_training_config(spec: Any, tmp_path: Path, message: str):
    base = {"trainer": {"max_epochs": 2}, "model": {}, "data": {}, **BASES[message]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(ConfigError, match=message):
        read_spec(spec(base="base.yaml"))


def test_settings_reach_the_config():
    base = {"model": {"grafts": [{"at": "a", "block": "sagan"}], "host": {"name": "x", "options": {}}}}
    changed = apply_settings(
        "here",
        base,
        {
            "block": "biggan",
            "site": "b",
            "heads": 2,
            "options.bias": False,
            "gamma_lr_scale": 3,
            "trainer.precision": 32,
        },
    )
    assert changed == {
        "model": {
            "grafts": [{"at": "b", "block": "biggan", "options": {"heads": 2, "bias": False}}],
            "host": {"name": "x", "options": {}},
            "optimizer": {"gamma_lr_scale": 3},
        },
        "trainer": {"precision": 32},
    }
    assert base["model"]["grafts"] == [{"at": "a", "block": "sagan"}]
    # a whole part first, then what is in it
    assert apply_settings("here", base, {"model.host.options": {"width": 2}, "host": "y"})["model"]["host"] == {
        "name": "y",
        "options": {"width": 2},
    }
    with pytest.raises(ConfigError, match="here: heads means the graft of the base config, which has 0"):
        apply_settings("here", {"model": {}}, {"heads": 2})
    with pytest.raises(ConfigError, match=r"model.host.name.a leads through name, which is 'x'"):
        apply_settings("here", base, {"model.host.name.a": 2})


def test_labels():
    assert label({"heads": 4, "block": "biggan", "site": "layer2"}) == "biggan at layer2, heads 4"
    assert label({"model.optimizer.weight_decay": 0.1}) == "weight_decay 0.1"
    assert label({"host": {"name": "resnet20"}}) == "host resnet20"


def test_variants_and_controls(spec: Any):
    read = read_spec(
        spec(
            axes={"block": ["sagan", "biggan"], "heads": [1, 2], "model.optimizer.lr": [0.1, 0.2]},
            exclude=[{"block": "biggan", "heads": 2}],
            variants={"slow": {"gamma_lr_scale": 1}},
            controls=["conv", "deeper"],
        )
    )
    found = {variant.name: variant for variant in make_variants(read, {"data.init_args.n_train": 64}, Models())}
    kinds = {name: (variant.kind, variant.baseline) for name, variant in found.items()}
    rates = [f"lr {rate}" for rate in (0.1, 0.2)]
    assert kinds == {
        **{name: ("baseline", name) for name in ("none", *(f"none, {rate}" for rate in rates))},
        **{f"{name}, {rate}": ("control", f"none, {rate}") for name in ("conv", "deeper") for rate in rates},
        **{
            f"{block}, heads {heads}, {rate}": ("variant", f"none, {rate}")
            for block, heads in (("sagan", 1), ("sagan", 2), ("biggan", 1))
            for rate in rates
        },
        "slow": ("variant", "none"),
    }
    for variant in found.values():
        assert variant.config["data"]["init_args"]["n_train"] == 64
        assert variant.config["model"]["optimizer"]["lr"] == variant.settings.get("model.optimizer.lr", 3e-3)
    assert found["none, lr 0.1"].config["model"]["grafts"] == []
    (conv,) = found["conv, lr 0.1"].config["model"]["grafts"]
    assert conv == {
        "at": "local",
        "block": "conv",
        "options": {"parameters": 2 * (128 * 16 + 16) + 128 * 128 + 128 + 1},
    }
    assert found["deeper, lr 0.2"].config["model"]["host"]["options"] == {"extra": 1}


@pytest.mark.slow
def test_controls_go_on_with_what_they_stand_beside(spec: Any):
    read = read_spec(
        spec(
            axes={"block": ["sagan", "nonlocal"], "site": ["local", "local.norm"]},
            controls=["conv", "context-max", "longer"],
            screen={"seeds": 1, "epochs": [1]},
            confirm={"seeds": 12, "epochs": [1], "choose": ["nonlocal at local"]},
        )
    )
    plan = new_plan(read, {"data.init_args.n_train": 64})
    assert with_controls(plan, ["nonlocal at local"]) == [
        *("none", "conv at local, like nonlocal", "context-max at local", "longer"),
        "nonlocal at local",
    ]
    assert len(with_controls(plan, [name for name, one in plan["variants"].items() if one["kind"] == "variant"])) == 12
