"""Ablation specs: the shipped ones changed, damaged text, and what small ones plan."""

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzzing import answer, fuzzed, json_values, wild, words
from hypothesis import strategies as st
from mappings import damaged, mutated

from sagan_attn.ablation.plan import new_plan
from sagan_attn.ablation.settings import SHORT_WORDS, apply_settings, check_settings, label
from sagan_attn.ablation.spec import read_spec
from sagan_attn.errors import SaganAttnError

CONFIGS = Path(__file__).parents[2] / "configs"
SPECS = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "ablation").glob("*.yaml")}
BASES = {name: (CONFIGS / "ablation" / spec["base"]).resolve() for name, spec in SPECS.items()}
SMALL = {
    "base": str(CONFIGS / "lookup.yaml"),
    "set": {"data.init_args.n_train": 16, "data.init_args.n_val": 8, "data.init_args.n_test": 8},
    "axes": {"block": ["sagan", "nonlocal"]},
    "controls": ["none"],
    "confirm": {"seeds": 6, "epochs": [1]},
}
WORDS = [*SHORT_WORDS, *("base", "set", "axes", "exclude", "variants", "controls", "baseline", "screen", "confirm")]
WORDS += ["expected_sd", "seeds", "epochs", "choose", "options.heads", "model.optimizer.lr", "trainer.precision"]
WORDS += ["model.grafts", "model.host.options", "data.init_args.batch_size", "trainer.max_epochs", "model.host.name"]
KEYS = st.sampled_from(WORDS)
VALUES = st.sampled_from(
    [
        *("sagan", "nonlocal", "encoder", "none", "conv", "context-max", "longer", "deeper", "wider", "se", "nothing"),
        *("local", "mix1", "stage:-1", "lookup-cnn", "LookupData", "../lookup.yaml", "spec.yaml", "/dev/null", "."),
        *([1, 2], [0], [6, 12], ["local", "mix1"], [["local"], "mix1"], [None, 1], [{}, []], ["sagan", "sagan"]),
        *(
            {"block": "sagan"},
            {"site": "local"},
            {"epochs": [1]},
            {"seeds": 6},
            {"a": {"block": "gc"}},
            [{"block": "se"}],
        ),
        *(0, 1, 2, 6, -1, 0.5, 1e9, 10**30, float("nan"), True, False, None, {}, [], "", "a.b.c", "2001-01-01"),
    ]
)


def _written(folder: Path, content: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogateescape")
    return path


@fuzzed(1500, few=25, name=st.sampled_from(sorted(SPECS)), data=st.data())
def test_a_changed_spec_is_read_or_refused(name: str, data: Any, tmp_path: Path):
    content = data.draw(mutated({**SPECS[name], "base": str(BASES[name])}, VALUES, KEYS, changes=3))
    path = _written(tmp_path, content)
    spec = answer(lambda: read_spec(path), str(path), str(content.get("base")) if isinstance(content, dict) else "")
    if not isinstance(spec, SaganAttnError):
        assert spec.confirm.seeds
        assert spec.axes or spec.variants
        yaml.safe_dump(spec.base)


@fuzzed(700, few=25, name=st.sampled_from(sorted(SPECS)), data=st.data())
def test_a_damaged_spec_is_read_or_refused(name: str, data: Any, tmp_path: Path):
    text = (CONFIGS / "ablation" / f"{name}.yaml").read_bytes().replace(b"../", b"")
    base = BASES[name].read_bytes()
    damage_base = data.draw(st.booleans())
    path, base_path = tmp_path / "spec.yaml", tmp_path / BASES[name].name
    path.write_bytes(text if damage_base else data.draw(damaged(text)))
    base_path.write_bytes(data.draw(damaged(base)) if damage_base else base)
    answer(lambda: read_spec(path), str(tmp_path))


@fuzzed(100, few=2, data=st.data())
def test_a_changed_small_spec_is_planned_or_refused(data: Any, tmp_path: Path):
    content = data.draw(mutated(SMALL, VALUES, KEYS))
    path, random = _written(tmp_path, content), torch.get_rng_state()
    spec = answer(lambda: read_spec(path))
    if isinstance(spec, SaganAttnError) or spec.base["data"].get("class_path") != "LookupData":
        return
    if _large(content):
        return  # images in the thousands are made when their data are set up
    plan = answer(lambda: new_plan(spec, {}))
    assert torch.equal(torch.get_rng_state(), random)
    if not isinstance(plan, SaganAttnError):
        assert plan["cells"]
        assert len({cell["key"] for cell in plan["cells"]}) == len(plan["cells"])


def _large(content: Any) -> bool:
    if isinstance(content, dict):
        return any(_large(value) for value in content.values())
    if isinstance(content, list):
        return any(_large(value) for value in content)
    return isinstance(content, (int, float)) and not abs(content) <= 1000


BASE = yaml.safe_load((CONFIGS / "lookup.yaml").read_text())
settings_ = st.dictionaries(KEYS | words, st.one_of(VALUES, json_values), max_size=4)


@fuzzed(800, few=30, settings=settings_ | wild, stage=st.booleans(), data=st.data())
def test_settings_are_made_or_refused(settings: Any, stage: bool, data: Any):
    if isinstance(answer(lambda: check_settings("here", settings, stage=stage), "here"), SaganAttnError):
        return
    base = BASE if data.draw(st.booleans()) else data.draw(mutated(BASE, VALUES, KEYS))
    before = copy.deepcopy(base)
    if isinstance(base, dict):
        made = answer(lambda: apply_settings("here", base, settings), "here")
        assert repr(base) == repr(before)
        assert isinstance(made, (dict, SaganAttnError))
    assert isinstance(label(settings), str)
