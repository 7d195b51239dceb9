"""The plan of an ablation: its cells and their keys, made once and kept in the folder.

A cell is a variant, a budget and a seed. Its key is a hash of what decides its result: the resolved training config
and the data, not the order of keys in a file, nor 1 for 1.0, nor the versions of the code, which results name.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from sagan_attn.ablation.models import Models, canonical
from sagan_attn.ablation.settings import Settings, apply_settings
from sagan_attn.ablation.spec import Spec, Stage, check_seeds
from sagan_attn.ablation.store import FORMAT, Store, read_plan
from sagan_attn.ablation.variants import Variant, make_variants
from sagan_attn.errors import ConfigError, SaganAttnError
from sagan_attn.training.class_paths import check_config, texts
from sagan_attn.training.resolve import resolve_config

__all__ = ["add_seeds", "add_stage", "cell_config", "chosen_by_name", "freeze", "frozen", "new_plan", "with_controls"]

CHANGED = "the plan was changed since it was made; choose another folder"
OF_STAGE = {"seeds": list, "budgets": list, "set": dict, "variants": list}
OF_VARIANT = {
    **dict.fromkeys(("label", "kind", "baseline", "note"), str),
    **dict.fromkeys(("settings", "config", "data"), dict),
    **dict.fromkeys(("parameters", "flops", "images"), int),
    "epochs_factor": (int, float),
    "of": list,
}
OF_CELL = {"stage": str, "budget": int, "variant": str, "seed": int, "added": bool}
OF_THE_CELL = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": None,
}


def new_plan(spec: Spec, extra: Settings) -> dict[str, Any]:
    """A plan with all variants and the spec's first stage. extra: settings for every cell beside the spec's.

    Raises `ConfigError`, `GraftError`, `BlockError` or `DataError` for whatever could not be run.
    """
    models = Models()
    variants = make_variants(spec, extra, models)
    plan: dict[str, Any] = {
        "format": FORMAT,
        "name": spec.name,
        "spec": spec.text,
        "base": spec.base,
        "set": dict(extra),
        "baseline": spec.baseline,
        "expected_sd": spec.expected_sd,
        "stages": {},
        "variants": {},
        "cells": [],
    }
    described = _describe(variants, models)
    for variant in variants:
        plan["variants"][variant.name] = {
            "label": variant.name,
            "kind": variant.kind,
            "baseline": variant.baseline,
            "settings": dict(variant.settings),
            "config": variant.config,
            "epochs_factor": variant.epochs_factor,
            "note": variant.note,
            "of": list(variant.of),
            **described[variant.name],
        }
    first = spec.stages[0]
    add_stage(plan, spec, first, list(plan["variants"]) if first.name == "screen" else chosen_by_name(plan, spec))
    return plan


def chosen_by_name(plan: Mapping[str, Any], spec: Spec) -> list[str]:
    """The variants that `confirm` names, or all, with their controls."""
    names = spec.confirm.choose if isinstance(spec.confirm.choose, tuple) else list(plan["variants"])
    if unknown := [name for name in names if name not in plan["variants"]]:
        raise ConfigError(
            f"{spec.path}: confirm.choose names {', '.join(map(repr, unknown))}; there are "
            + ", ".join(map(repr, plan["variants"]))
        )
    return with_controls(plan, names)


def with_controls(plan: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """These variants, the baseline, and every control that stands beside one of them."""

    def wanted(name: str, one: Mapping[str, Any]) -> bool:
        if one["kind"] == "control":
            return name in names or not one["of"] or any(other in names for other in one["of"])
        return one["kind"] == "baseline" or name in names

    return [name for name, one in plan["variants"].items() if wanted(name, one)]


def add_stage(plan: dict[str, Any], spec: Spec, stage: Stage, names: Sequence[str]) -> None:
    """Add the cells of a stage for the variants of these names, whose configs are all checked."""
    plan["stages"][stage.name] = {
        "seeds": list(stage.seeds),
        "budgets": list(stage.epochs),
        "set": dict(stage.settings),
        "variants": list(names),
    }
    keys = {cell["key"]: cell for cell in plan["cells"]}
    for name in names:
        for budget in stage.epochs:
            for cell in _cells(plan, spec, stage, name, budget):
                if cell["key"] in keys:
                    other = keys[cell["key"]]["variant"]
                    raise ConfigError(
                        f"{spec.path}: {name!r} and {other!r} are the same training run, to the last option: "
                        + _nothing_changed(plan, name, other)
                    )
                keys[cell["key"]] = cell
                plan["cells"].append(cell)


def add_seeds(plan: dict[str, Any], spec: Spec, count: int, done: Collection[str] = ()) -> bool:
    """Add so many fresh seeds to `confirm`, marked as added after looking; returns whether any were.

    done: keys of cells with a result. While any that were added before are not among them, these are first.
    """
    if any(cell["added"] and cell["key"] not in done for cell in plan["cells"]):
        return False
    stage = plan["stages"].get("confirm")
    if stage is None:
        raise ConfigError(f"{spec.path}: confirm has not begun: give it more seeds in the spec")
    check_seeds("--add-seeds", count)
    first = max(cell["seed"] for cell in plan["cells"]) + 1
    fresh = range(first, first + count)
    more = Stage("confirm", tuple(fresh), tuple(stage["budgets"]), stage["set"])
    for name in stage["variants"]:
        for budget in more.epochs:
            plan["cells"] += [{**cell, "added": True} for cell in _cells(plan, spec, more, name, budget)]
    stage["seeds"] += list(fresh)
    stage["added_seeds"] = [*stage.get("added_seeds", []), *fresh]
    return True


def _cells(plan: Mapping[str, Any], spec: Spec, stage: Stage, name: str, budget: int) -> list[dict[str, Any]]:
    variant = plan["variants"][name]
    config = cell_config(variant, stage.settings, budget, 0)
    resolved = resolve_config(config, f"{spec.path}: {name} at {budget} epochs")
    cells = []
    for seed in stage.seeds:
        content = {"stage": stage.name, "budget": budget, "data": variant["data"], **canonical(resolved, seed)}
        text = json.dumps(content, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        cells.append({"key": key, "stage": stage.name, "budget": budget, "variant": name, "seed": seed, "added": False})
    return cells


def cell_config(variant: Mapping[str, Any], settings: Settings, budget: int, seed: int) -> dict[str, Any]:
    """The training config of a cell: the variant's, with seed, epochs and a warm-up in proportion to them."""
    config = apply_settings(variant["label"], variant["config"], settings)
    trainer = config.setdefault("trainer", {})
    factor = variant["epochs_factor"]
    epochs = budget if factor == 1 else max(budget + 1, math.ceil(budget * factor))  # "longer" is never less than that
    warmup = config.get("model", {}).get("schedule", {}).get("warmup_epochs")
    if warmup:
        config["model"]["schedule"]["warmup_epochs"] = warmup * epochs / trainer["max_epochs"]
    trainer |= {**OF_THE_CELL, "max_epochs": epochs}
    config["data"].setdefault("init_args", {})["order_seed"] = seed
    config["seed_everything"] = seed
    return config


def _describe(variants: Sequence[Variant], models: Models) -> dict[str, dict[str, Any]]:
    """Parameters, FLOPs of an image, grafts and the data's fingerprints of each variant."""
    described: dict[str, dict[str, Any]] = {}
    for variant in sorted(variants, key=lambda variant: variant.kind != "variant"):  # whose faults its baseline has too
        try:
            epochs = variant.config["trainer"]["max_epochs"]
            config = cell_config(asdict(variant) | {"label": variant.name}, {}, epochs, 0)
            resolved = models.resolve(config, variant.name)
            size = models.size(resolved)
        except SaganAttnError as error:
            named = str(error).startswith(f"{variant.name}: ")
            raise error if named else type(error)(f"{variant.name}: {error}") from error
        described[variant.name] = {
            "parameters": size.parameters,
            "flops": size.flops,
            "grafts": list(size.grafts),
            "images": resolved.data.describe()["sizes"]["train"],
            "data": models.fingerprints(resolved),
        }
    return described


def _nothing_changed(plan: Mapping[str, Any], one: str, other: str) -> str:
    a, b = (plan["variants"][name]["settings"] for name in (one, other))
    axes = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return f"{', '.join(axes) or 'the name'} changes nothing there; exclude one of the two"


def freeze(store: Store, plan: Mapping[str, Any]) -> None:
    """Write the plan. Raises `OSError`."""
    store.write(store.plan, plan)


def frozen(store: Store, spec: Spec, extra: Settings) -> dict[str, Any] | None:
    """The plan in the folder, which must be the spec's; None for a new folder.

    Raises `ConfigError`, naming what differs: a spec that changed after cells were computed would mix two questions. So
    it does for configs in the plan that name other classes than the spec's, its base's and those of `ALLOWED`.
    """
    if not store.plan.is_file():
        others = [path for path in store.folder.glob("*") if not path.name.startswith(".")]  # of a killed runner
        if others:
            raise ConfigError(f"{store.folder} holds other files and no ablation: choose another folder")
        return None
    plan = read_plan(store.folder)
    differing = [
        name
        for name, ours in (("spec", spec.text), ("base", json.loads(json.dumps(spec.base))), ("set", dict(extra)))
        if plan.get(name) != ours
    ]
    if differing:
        raise ConfigError(
            f"{store.folder} holds an ablation with another {' and another '.join(differing)} than {spec.path}: choose "
            "another folder, or put it back (more seeds: --add-seeds)"
        )
    _check_configs(store, plan, spec, extra)
    return plan


def _check_configs(store: Store, plan: Mapping[str, Any], spec: Spec, extra: Settings) -> None:
    """Refuse a plan that was changed since it was made: whoever gives its spec did not read the plan."""
    _check_shape(store.plan, plan)
    said = {*spec.base, *texts([yaml.safe_load(spec.text), spec.base, extra])}
    for stage in plan["stages"].values():
        for name in stage["variants"]:
            try:
                config = cell_config(plan["variants"][name], stage["set"], 1, 0)
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{store.plan}: variant {name!r} has no training config: {error!r}") from error
            check_config(config, f"{store.plan}, {name}", said=said, hint=CHANGED)


def _check_shape(path: Path, plan: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless a plan has the parts that cells are made of, each of its type."""

    def fits(of: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> bool:
        return isinstance(of, dict) and all(isinstance(of.get(name), kind) for name, kind in kinds.items())

    stages = plan.get("stages")
    if not isinstance(stages, dict) or not all(fits(stage, OF_STAGE) for stage in stages.values()):
        raise ConfigError(f"{path} is not the plan of an ablation: stages are missing or not whole")
    for name, variant in plan["variants"].items():
        if not fits(variant, OF_VARIANT):
            raise ConfigError(f"{path} is not the plan of an ablation: variant {name!r:.100} is not whole")
    for cell in plan["cells"]:
        if not fits(cell, OF_CELL) or cell["stage"] not in stages:
            raise ConfigError(f"{path} is not the plan of an ablation: cell {cell!r:.100} is not whole")
    for name, stage in stages.items():
        if unknown := [one for one in stage["variants"] if not isinstance(one, str) or one not in plan["variants"]]:
            raise ConfigError(f"{path} is not the plan of an ablation: stage {name!r} names {unknown[0]!r:.100}")
