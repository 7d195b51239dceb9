"""What a variant changes in a training config: short words for grafts, dotted keys for the rest."""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from sagan_attn.errors import ConfigError

__all__ = ["SHORT_WORDS", "Settings", "apply_settings", "check_settings", "graft_of", "label"]

Settings = Mapping[str, Any]

GRAFT = {"block": "block", "site": "at", "pruned_heads": "pruned_heads"}
OPTIONS = {
    "heads": "heads",
    "reduction": "reduction",
    "value_reduction": "value_reduction",
    "scale": "scale",
    "pooling": "pool",
    "gamma_init": "gamma_init",
    "mode": "mode",
    "position": "position",
    "dropout": "dropout",
}
RATES = {name: f"model.optimizer.{name}" for name in ("lr", "graft_lr_scale", "gamma_lr_scale")}
PARTS = {"data": "data", "host": "model.host"}
# of an ablation's spec, each meaning a part of the training config
SHORT_WORDS = (*GRAFT, *OPTIONS, *RATES, *PARTS)
ROOTS = ("trainer", "model", "data")
RESERVED = {  # decided by the seed and the budget of a cell
    "seed_everything": "seeds of a stage decide it",
    "trainer.max_epochs": "epochs of a stage decide it",
    "data.init_args.order_seed": "seeds of a stage decide it",
    "run_dir": "each cell has its own",
    **dict.fromkeys(
        ("trainer.max_steps", "trainer.max_time", "trainer.fast_dev_run", "trainer.overfit_batches"),
        "a run goes on to its last epoch, over all of its images",
    ),
    **dict.fromkeys(("trainer.devices", "trainer.num_nodes"), "a cell has one device"),
}
# What a stage may set for itself: how long and how is trained, not what.
OF_A_STAGE = ("trainer.", "model.optimizer.", "model.schedule.", "model.label_smoothing")


def check_settings(where: str, settings: Any, *, stage: bool = False) -> None:
    """Raise `ConfigError` unless all keys are short words or dotted paths into a training config; for a `stage`, of
    what it may set."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: {settings!r} must be a mapping of keys to values")
    for key in settings:
        if key in RESERVED:
            raise ConfigError(f"{where}: {key} cannot be set: {RESERVED[key]}")
        if stage and key not in RATES and not str(key).startswith(OF_A_STAGE):
            raise ConfigError(f"{where}: {key} cannot be set for a stage, which would be about other models: use `set`")
        root, dot, _ = str(key).partition(".")
        if key not in SHORT_WORDS and not (dot and root in (*ROOTS, "options")):
            near = difflib.get_close_matches(str(key), SHORT_WORDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"short words are {', '.join(SHORT_WORDS)}"
            raise ConfigError(
                f"{where}: unknown key {key!r}; {hint} Others are dotted, such as model.optimizer.weight_decay, or "
                "options.<option of the block>"
            )


def apply_settings(where: str, config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """A copy of the training config with the settings made, those of parts before those of single values.

    Raises `ConfigError` for a word of the graft where the config has not exactly one, or a path through a value.
    """
    config = copy.deepcopy(dict(config))
    for key, value in sorted(settings.items(), key=lambda item: item[0] not in (*PARTS, "model.grafts")):
        value = copy.deepcopy(value)
        if key in GRAFT:
            graft_of(where, config, key)[GRAFT[key]] = value
        elif key in OPTIONS or key.startswith("options."):
            options = graft_of(where, config, key).setdefault("options", {})
            options[OPTIONS.get(key, key.removeprefix("options."))] = value
        elif key == "host" and isinstance(value, str):
            _set(where, config, PARTS[key], {"name": value})
        elif key == "data" and isinstance(value, str):
            _set(where, config, PARTS[key], {"class_path": value, "init_args": {}})
        else:
            _set(where, config, RATES.get(key) or PARTS.get(key) or key, value)
    return config


def graft_of(where: str, config: dict[str, Any], key: str) -> dict[str, Any]:
    """The one graft of a config, to be changed."""
    grafts = config.get("model", {}).get("grafts") or []
    if len(grafts) != 1:
        raise ConfigError(
            f"{where}: {key} means the graft of the base config, which has {len(grafts)}: set model.grafts"
        )
    return grafts[0]


def label(settings: Settings) -> str:
    """A name made of the settings: "biggan at layer2, heads 4"."""
    words = [str(settings["block"])] if "block" in settings else []
    if "site" in settings:
        site = settings["site"]
        words.append(f"at {'+'.join(site) if isinstance(site, list) else site}")
    first = " ".join(words)
    others = [key for key in settings if key not in ("block", "site")]
    lasts = [key.rpartition(".")[2] for key in others]
    shown = [key if lasts.count(last) > 1 else last for key, last in zip(others, lasts, strict=True)]
    rest = [f"{short} {_short(settings[key])}" for short, key in zip(shown, others, strict=True)]
    return ", ".join([*([first] if first else []), *rest])


def _short(value: Any) -> str:
    """In words: a host by its name and options, data by their class and arguments."""
    if not isinstance(value, Mapping):
        return str(value)
    words = [str(each) for key, each in value.items() if key in ("name", "class_path")]
    for key, each in value.items():
        if isinstance(each, Mapping):
            words += [f"{name}={_short(one)}" for name, one in each.items()]
        elif key not in ("name", "class_path"):
            words.append(f"{key}={each}")
    return " ".join(words)


def _set(where: str, config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: {path} leads through {parent}, which is {place!r}")
    place[last] = value
