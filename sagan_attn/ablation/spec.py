"""The spec of an ablation: one YAML file, read, checked and frozen.

    base: ../cifar10_resnet20.yaml     the training config that everything else changes; beside the spec's file
    set: {data.init_args.limit_train: 10000}     dotted keys, for every cell
    axes:                              the grid: every combination is a variant
      block: [sagan, biggan]
      site: [layer2, layer3]
    exclude: [{block: biggan, site: layer3}]     combinations to leave out
    variants:                          single variants beside the grid, by name
      slow gamma: {gamma_lr_scale: 1}
    controls: [none, conv, context-max]
    baseline: none                     what everything is compared with
    screen: {seeds: 3, epochs: [3]}    optional: which variants are worth confirming, on the validation part
    confirm: {seeds: 12, epochs: [6, 12], choose: 2}     fresh seeds; the test split is read once a cell
    expected_sd: 0.002                 between runs that differ in the seed alone, as a share; for planning

A key is a short word (`SHORT_WORDS`) or a dotted path into the training config.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sagan_attn.ablation.controls import CONTROLS
from sagan_attn.ablation.settings import RESERVED, Settings, check_settings
from sagan_attn.ablation.statistics import smallest_p
from sagan_attn.errors import ConfigError
from sagan_attn.training.class_paths import check_file

__all__ = ["CONFIRM_SEEDS_FROM", "Spec", "Stage", "StageName", "check_seeds", "read_spec"]

StageName = Literal["screen", "confirm"]
KEYS = ("base", "set", "axes", "exclude", "variants", "controls", "baseline", "screen", "confirm", "expected_sd")
STAGE_KEYS = ("seeds", "epochs", "set", "choose")
SEEDS = {"screen": 3, "confirm": 12}
CONFIRM_SEEDS_FROM = 1000  # so that no seed of a screen is among them
MOST_SEEDS, LARGEST_SEED = 10_000, 2**32 - 1  # the second is numpy's
MOST_EPOCHS = 1_000_000
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Stage:
    """One stage: the seeds and budgets (epochs) of each of its variants.

    choose (confirm): how many variants of the screen go on, or their names; None for all.
    """

    name: StageName
    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    settings: Settings
    choose: int | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Spec:
    """A checked spec; see the module for what its parts mean."""

    path: Path
    text: str
    base: dict[str, Any]
    settings: Settings
    axes: Mapping[str, Sequence[Any]]
    exclude: tuple[Settings, ...]
    variants: Mapping[str, Settings]
    controls: tuple[str, ...]
    baseline: str
    screen: Stage | None
    confirm: Stage
    expected_sd: float | None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def stages(self) -> list[Stage]:
        return [stage for stage in (self.screen, self.confirm) if stage]


def read_spec(path: Path) -> Spec:
    """The spec in a file.

    Raises:
        ConfigError: it is missing or no YAML, has an unknown key, or asks for what cannot be: seeds used twice, or
            too few of them for any result of `confirm` to be significant. Or its base lies in a run folder and names
            other classes than those may.
    """
    text, content = _yaml(path)
    _known(str(path), content, KEYS)
    if "base" not in content:
        raise ConfigError(f"{path}: base is missing: the training config to be changed")
    if not isinstance(content["base"], str):
        raise ConfigError(f"{path}: base ({content['base']!r:.100}) must be the path of a training config")
    base_path = path.parent / content["base"]
    check_file(base_path)
    base = _yaml(base_path)[1]
    epochs = _check_base(base_path, base)
    controls = _list(path, "controls", content.get("controls", []))
    for control in controls:
        if not isinstance(control, str) or control not in CONTROLS:
            near = difflib.get_close_matches(str(control), CONTROLS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(CONTROLS)}"
            raise ConfigError(f"{path}: unknown control {control!r:.100}{hint}")
    axes = {str(key): _list(path, f"axes.{key}", values) for key, values in _dict(path, content, "axes").items()}
    for key, values in axes.items():
        if len(values) < 2:
            raise ConfigError(f"{path}: axes.{key} has {len(values)} value: an axis needs at least 2, `set` takes one")
    variants = {str(key): value or {} for key, value in _dict(path, content, "variants").items()}
    excluded = _list(path, "exclude", content.get("exclude", []))
    settings = _dict(path, content, "set")
    screen, confirm = (_stage(path, content, name, epochs) for name in ("screen", "confirm"))
    for stage in (screen, confirm):
        check_settings(f"{path}: {stage.name if stage else ''}", stage.settings if stage else {}, stage=True)
    for one in [dict.fromkeys(axes), settings, *variants.values(), *excluded]:
        check_settings(str(path), one)
    for one in excluded:
        if foreign := one.keys() - axes.keys():
            raise ConfigError(f"{path}: exclude names {', '.join(sorted(foreign))}, which is no axis")
    if not axes and not variants:
        raise ConfigError(f"{path}: neither axes nor variants: there is nothing to compare")
    sd = content.get("expected_sd")
    if sd is not None and (isinstance(sd, bool) or not isinstance(sd, (int, float)) or not 0 < sd < 1):
        raise ConfigError(f"{path}: expected_sd ({sd!r}) must be a share between 0 and 1: 0.002 for 0.2 %")
    assert confirm is not None  # for the type checker: only a screen can be left out
    _check_seeds(path, screen, confirm)
    return Spec(
        path=path,
        text=text,
        base=base,
        settings=settings,
        axes=axes,
        exclude=tuple(excluded),
        variants=variants,
        controls=tuple(dict.fromkeys(["none", *controls] if content.get("baseline", "none") == "none" else controls)),
        baseline=str(content.get("baseline", "none")),
        screen=screen,
        confirm=confirm,
        expected_sd=sd,
    )


def _check_base(path: Path, base: Mapping[str, Any]) -> int:
    """The epochs of a training config that has the parts an ablation changes. Raises `ConfigError`."""
    for part in ("trainer", "model", "data"):
        if not isinstance(base.get(part), dict):
            raise ConfigError(f"{path}: {part} ({base.get(part)!r}) must be a mapping: it is no training config")
    epochs, model = base["trainer"].get("max_epochs"), base["model"]
    if type(epochs) is not int or not 1 <= epochs <= MOST_EPOCHS:
        raise ConfigError(
            f"{path}: trainer.max_epochs ({epochs!r:.100}) must be a whole number from 1 to {MOST_EPOCHS:,}"
        )
    grafts = model.get("grafts") or []
    if not isinstance(grafts, list) or not all(isinstance(graft, dict) for graft in grafts):
        raise ConfigError(f"{path}: model.grafts ({grafts!r}) must be a list of mappings")
    if not isinstance(model.get("schedule", {}), dict):
        raise ConfigError(f"{path}: model.schedule ({model['schedule']!r}) must be a mapping")
    for key in ("max_time", "fast_dev_run", "max_steps", "overfit_batches", "devices", "num_nodes"):
        value = base["trainer"].get(key)
        if (value is True or value not in (None, -1, 0, 1, "auto")) and f"trainer.{key}" in RESERVED:
            raise ConfigError(f"{path}: trainer.{key} cannot be set: {RESERVED[f'trainer.{key}']}")
    for callback in base["trainer"].get("callbacks") or []:
        if str(callback.get("class_path", "")).rpartition(".")[2] in ("EarlyStopping", "ModelCheckpoint"):
            raise ConfigError(f"{path}: callback {callback['class_path']} chooses an epoch, and the last one counts")
    return epochs


def _stage(path: Path, content: Mapping[str, Any], name: StageName, epochs: int) -> Stage | None:
    if name == "screen" and content.get("screen") is None:
        return None
    given = _dict(path, content, name)
    _known(f"{path}: {name}", given, STAGE_KEYS if name == "confirm" else STAGE_KEYS[:-1])
    first = 0 if name == "screen" else CONFIRM_SEEDS_FROM
    seeds = given.get("seeds", SEEDS[name])
    if type(seeds) is int:
        check_seeds(f"{path}: {name}.seeds", seeds)
        seeds = list(range(first, first + seeds))
    budgets = given.get("epochs", [epochs] if name == "screen" else sorted({-(-epochs // 2), epochs}))
    budgets = budgets if isinstance(budgets, list) else [budgets]
    numbers = (
        _whole(path, f"{name}.seeds", seeds, 0, LARGEST_SEED),
        _whole(path, f"{name}.epochs", budgets, 1, MOST_EPOCHS),
    )
    choose = given.get("choose")
    if choose is not None and content.get("screen") is None and not isinstance(choose, list):
        raise ConfigError(f"{path}: confirm.choose ({choose!r}) needs a screen to choose by, or a list of names")
    if isinstance(choose, list):
        choose = tuple(map(str, choose))
    elif choose is not None and (type(choose) is not int or choose < 1):
        raise ConfigError(f"{path}: confirm.choose ({choose!r}) must be a number of variants or a list of their names")
    return Stage(name, numbers[0], tuple(sorted(numbers[1])), _dict(path, given, "set"), choose)


def check_seeds(where: str, count: int) -> None:
    """Raise `ConfigError` for more seeds than anybody computes."""
    if count > MOST_SEEDS:
        raise ConfigError(f"{where} ({count!r:.100}) must be at most {MOST_SEEDS:,}")


def _whole(path: Path, key: str, numbers: Any, least: int, most: int) -> tuple[int, ...]:
    whole = isinstance(numbers, list) and all(type(n) is int and least <= n <= most for n in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        how_many = ", or how many of them" if key.endswith("seeds") else ""
        raise ConfigError(
            f"{path}: {key} ({numbers!r:.100}) must be whole numbers of at least {least}, each once{how_many}, and at "
            f"most {most:,}"
        )
    return tuple(numbers)


def _check_seeds(path: Path, screen: Stage | None, confirm: Stage) -> None:
    if screen and (both := set(screen.seeds) & set(confirm.seeds)):
        raise ConfigError(
            f"{path}: seeds {', '.join(map(str, sorted(both)))} are in screen and confirm: a choice is confirmed by "
            "seeds it was not made with"
        )
    n = len(confirm.seeds)
    if (p := smallest_p(n)) >= SIGNIFICANT:
        enough = next(more for more in range(n, 100) if smallest_p(more) < SIGNIFICANT)
        raise ConfigError(
            f"{path}: with {n} seeds the smallest p a sign-flip test can give is {p:.3g}, so nothing could be "
            f"significant at {SIGNIFICANT:g}: confirm needs at least {enough} seeds"
        )


def _yaml(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not {type(content).__name__}")
    return text, content


def _known(where: str, content: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in content:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(keys)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _dict(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} ({value!r}) must be a mapping")
    return dict(value or {})


def _list(path: Path, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: {key} ({value!r}) must be a list")
    return value
