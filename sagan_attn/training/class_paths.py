"""What a config may name that travels with a run or an ablation, as strangers' checkpoints do: classes of a list alone.

A config that somebody gives with `--config` is their own word, and may name any class. One that lies in a run folder or
in an ablation's is what some `fit` wrote, or somebody who wants it to look so, and jsonargparse imports and calls what
a config names: a class path anywhere, a bare name or a dotted path where a class or a callable is taken, YAML inside
of a text. So such a config must have the shape that `fit` writes, and name classes of `ALLOWED` alone.
"""

import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sagan_attn.errors import ConfigError
from sagan_attn.files import read_text

__all__ = ["ALLOWED", "DATASETS", "check_config", "check_file", "texts", "travels"]

# Class -> arguments that must be left out: jsonargparse imports what they name, or something is written there.
ALLOWED: dict[str, tuple[str, ...]] = {
    "sagan_attn.training.data.CIFARData": (),
    "sagan_attn.training.data.FolderData": (),
    "sagan_attn.training.data.LookupData": (),
    "sagan_attn.training.data.TorchvisionData": (),
    "sagan_attn.training.attention_log.AttentionLog": (),
    "sagan_attn.training.finite.FiniteGuard": (),
    "sagan_attn.training.progress.SecondBar": (),
    "lightning.pytorch.callbacks.DeviceStatsMonitor": (),
    "lightning.pytorch.callbacks.EarlyStopping": (),
    "lightning.pytorch.callbacks.EMAWeightAveraging": ("device", "multi_avg_fn"),
    "lightning.pytorch.callbacks.GradientAccumulationScheduler": (),
    "lightning.pytorch.callbacks.LearningRateMonitor": (),
    "lightning.pytorch.callbacks.ModelCheckpoint": ("dirpath", "filename"),
    "lightning.pytorch.callbacks.ModelSummary": (),
    "lightning.pytorch.callbacks.RichModelSummary": (),
    "lightning.pytorch.callbacks.RichProgressBar": ("console_kwargs",),
    "lightning.pytorch.callbacks.TQDMProgressBar": (),
    "lightning.pytorch.loggers.CSVLogger": ("save_dir",),
    "lightning.pytorch.loggers.MLFlowLogger": ("artifact_location", "save_dir", "tracking_uri"),
    "lightning.pytorch.loggers.TensorBoardLogger": (),
    "lightning.pytorch.loggers.WandbLogger": ("dir", "experiment", "save_dir"),
}
BARE = {path.rpartition(".")[2]: path for path in ALLOWED}

# Of TorchvisionData.dataset: those that never unpickle a file, or only one whose md5 they know.
NAMES = (
    *("CIFAR10", "CIFAR100", "Country211", "DTD", "EMNIST", "EuroSAT", "FGVCAircraft", "FakeData", "FashionMNIST"),
    *("Flowers102", "Food101", "GTSRB", "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet", "QMNIST", "RenderedSST2"),
    *("STL10", "SVHN", "StanfordCars", "USPS"),
)
DATASETS = frozenset(f"torchvision.datasets.{name}" for name in NAMES)

# Keys that must be left out anywhere: timm loads what they name, a file or an address, in some ways by unpickling it;
# Lightning sends checkpoints to the last.
LOADED = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "model_registry")

# Where loggers write, which only `fit` does; it puts the run folder in the place of what they have by themselves.
TARGETS = ("artifact_location", "dir", "save_dir", "tracking_uri")
UNSET = (".", "./mlruns")
FURTHER = {"lightning.pytorch.loggers.WandbLogger": ("entity", "group", "job_type", "notes", "tags")}  # of dict_kwargs

SECTIONS = ("seed_everything", "trainer", "model", "data", "run_dir")  # what `fit` keeps of a call
WORDS = ("accelerator", "strategy", "profiler")  # of the trainer: a word or a class
CLASSES = ("callbacks", "logger", "plugins")  # of the trainer: classes
OF_CLASS = ("class_path", "init_args")
MAPPINGS = ("data", "host", "optimizer", "schedule", "augment", "theme", "options")  # a text would be a class or a file
MAX_BYTES = 1_000_000  # a config has some thousand
MAX_NODES, MAX_DEPTH, MAX_TEXT = 20_000, 40, 2_000
# The second is jsonargparse's. It dies of what is nested some ten thousand levels, which the first refuses.
LOADERS = tuple(getattr(yaml, name) for name in ("SafeLoader", "CSafeLoader") if hasattr(yaml, name))

OF_RUN = ("environment.json", "classes.json", "transform.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
READ_IT = "read the file, and if it is what you want copy it elsewhere and give the copy with --config"


def travels(path: str | Path) -> bool:
    """Whether a file lies in a run folder or in the folder of an ablation, as given or with its links followed."""
    return any(_in_record(place) for place in {Path(os.path.abspath(path)), Path(os.path.realpath(path))})


def check_file(path: str | Path, *, fitting: bool = True) -> None:
    """Refuse a config that travels and names more than it may; any other file is left unread.

    fitting: False for a command that logs nothing, to which it is all the same where loggers write. Raises
    `ConfigError`.
    """
    if not Path(path).is_file() or not travels(path):
        return
    try:
        text = read_text(path, MAX_BYTES)
        configs = [yaml.load(text, Loader=loader) for loader in LOADERS]
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as the config of a run: {reason}") from error
    for config in configs:
        check_config(config, str(path), fitting=fitting)


def check_config(
    config: Any, where: str, *, said: Collection[str] = (), hint: str = READ_IT, fitting: bool = True
) -> None:
    """Refuse a training config that travels unless it has the shape that `fit` writes and names what it may.

    Args:
        where: the file, for messages.
        said: texts of the user's own config, which may stand anywhere here too.
        hint: what to do.
        fitting: see `check_file`.

    Raises:
        ConfigError: the key and what stands there.
    """
    _Check(where, frozenset(said), hint, fitting).whole(config)


def texts(value: Any) -> Iterator[str]:
    """Every text in a config, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from texts(each)


@dataclass
class _Check:
    where: str
    said: frozenset[str]
    hint: str
    fitting: bool
    nodes: int = 0

    def whole(self, config: Any) -> None:
        for name, value in self.mapping(config, "", 0):
            if name == "data":
                self.item(name, value, name, 1)
                if "class_path" not in value:
                    self.refuse(name, "has no class_path")
            elif name in ("trainer", "model"):
                for key, each in self.mapping(value, name, 1):
                    self.of_section(name, key, each)
            elif name in SECTIONS or (name in self.said and name != "config"):
                self.anything(value, name, 1)
            else:
                self.refuse(name, "is no part of what a run keeps of its config")

    def of_section(self, section: str, key: str, value: Any) -> None:
        place = f"{section}.{key}"
        if key in OF_CLASS:
            self.refuse(place, "is of a class, where none is taken")
        if section == "trainer" and key in (*WORDS, *CLASSES):
            word = isinstance(value, str) and value.replace("_", "").isalnum() and value.islower()
            if not (word and key in WORDS):
                self.a_class(value, place, 2)
        elif key == "grafts":
            for index, graft in enumerate(value if isinstance(value, list) else []):
                self.items(graft, f"{place}.{index}", 3)
            if value is not None and not isinstance(value, list):
                self.refuse(place, f"must be a list, not {_short(value)}")
        else:
            self.item(key, value, place, 2)

    def a_class(self, value: Any, place: str, depth: int) -> None:
        """A place where jsonargparse takes a class, or several."""
        if isinstance(value, list):
            for index, each in enumerate(value):
                self.a_class(each, f"{place}.{index}", depth + 1)
        elif isinstance(value, Mapping):
            if "class_path" not in value:
                self.refuse(place, "has no class_path")
            self.items(value, place, depth)
        elif isinstance(value, str):
            self.named(value, place)
        else:
            self.anything(value, place, depth)

    def items(self, value: Any, place: str, depth: int) -> None:
        """A mapping, which may be a class with its arguments."""
        content = dict(self.mapping(value, place, depth))
        if not content.keys() & {*OF_CLASS}:
            for key, each in content.items():
                self.item(key, each, f"{place}.{key}", depth + 1)
            return
        known = self.named(content.get("class_path"), f"{place}.class_path")
        further = FURTHER.get(known or "", ())
        if more := content.keys() - {*OF_CLASS, *(["dict_kwargs"] if further else [])}:
            self.refuse(f"{place}.{min(more)}", "is no part of a class: class_path and init_args are")
        for key, each in self.mapping(content.get("dict_kwargs") or {}, f"{place}.dict_kwargs", depth + 1):
            if key not in further:
                self.refuse(f"{place}.dict_kwargs.{key}", f"is {_short(each)}, and must be left out")
            self.anything(each, f"{place}.dict_kwargs.{key}", depth + 2)
        for key, each in self.mapping(content.get("init_args") or {}, f"{place}.init_args", depth + 1):
            self.argument(known, key, each, f"{place}.init_args.{key}", depth + 2)

    def argument(self, known: str | None, key: str, value: Any, place: str, depth: int) -> None:
        """An argument of a class of `ALLOWED`, or of one of the user's own (None), which may take callables."""
        if known is None:
            self.bounded(value, place, depth)
            if not self.said.issuperset(texts(value)):
                self.refuse(place, f"is {_short(value)}, which stands nowhere in your own config")
            return
        self.item(key, value, place, depth)
        if value is not None and not self.said.issuperset(texts(value)):
            if key in ALLOWED[known] and not (key in TARGETS and self.harmless(value)):
                self.refuse(place, f"is {_short(value)}, and must be left out")
            if known.endswith(".TorchvisionData") and key == "dataset" and value not in DATASETS:
                self.refuse(place, f"names {_short(value)}, which is none of the data sets that it may name")

    def harmless(self, target: Any) -> bool:
        """Whether nothing is sent or written to where a logger says, or it is where this user's MLflow is anyway."""
        return not self.fitting or target in (*UNSET, os.environ.get("MLFLOW_TRACKING_URI"))

    def bounded(self, value: Any, place: str, depth: int) -> None:
        self.count(place, depth)
        for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            self.bounded(each, place, depth + 1)

    def item(self, key: str, value: Any, place: str, depth: int) -> None:
        if key in MAPPINGS and value is not None and not isinstance(value, Mapping):
            self.refuse(place, f"must be a mapping, not {_short(value)}")
        self.anything(value, place, depth)
        if key in LOADED and value is not None and not (self.said and self.said.issuperset(texts(value))):
            self.refuse(place, f"is {_short(value)}, and must be left out")

    def anything(self, value: Any, place: str, depth: int) -> None:
        """A value that is taken as it is, and looked through for classes all the same."""
        self.count(place, depth)
        if isinstance(value, Mapping):
            self.items(value, place, depth)
        elif isinstance(value, list):
            for index, each in enumerate(value):
                self.anything(each, f"{place}.{index}", depth + 1)
        elif isinstance(value, str):
            self.text(value, place, depth)

    def text(self, value: str, place: str, depth: int) -> None:
        """A text, which jsonargparse takes for what it says if it is YAML."""
        if len(value) > MAX_TEXT:
            self.refuse(place, f"is a text of {len(value):,} characters; {MAX_TEXT:,} are read")
        if value in self.said or not {*value} & {":", "?", "{"}:  # without which YAML has no mappings
            return
        for loader in LOADERS:
            found = None
            with suppress(yaml.YAMLError, ValueError, RecursionError):
                found = yaml.load(value, Loader=loader)
            self.inside(found, place, depth)

    def inside(self, value: Any, place: str, depth: int) -> None:
        """What a text says as YAML: anything but a class."""
        self.count(place, depth)
        if isinstance(value, Mapping):
            if any(word in str(key) for key in value for word in (*OF_CLASS, "__")):
                self.refuse(place, f"is a text that names a class: {_short(value)}")
            value = list(value.values())
        for each in value if isinstance(value, list) else ():
            self.text(each, place, depth + 1) if isinstance(each, str) else self.inside(each, place, depth + 1)

    def named(self, path: Any, place: str) -> str | None:
        """The entry of `ALLOWED` that a class path or a bare name means; None for what the user's config names."""
        found = (path if path in ALLOWED else BARE.get(path)) if isinstance(path, str) else None
        if found is None and not (isinstance(path, str) and path in self.said):
            self.refuse(place, f"names {_short(path)}, which is none of the classes that it may name")
        return found

    def mapping(self, value: Any, place: str, depth: int) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, Mapping):
            self.refuse(place, f"must be a mapping, not {_short(value)}")
        for key, each in value.items():
            self.count(place, depth)
            name = str(key)
            if not isinstance(key, str | int) or not (name.isidentifier() or name.isdigit()) or name.startswith("__"):
                self.refuse(place, f"has a key {_short(key)}, which is no name")  # "a.b" and "a+" mean other places
            yield name, each

    def count(self, place: str, depth: int) -> None:
        """Bounds what aliases of YAML would blow up."""
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            self.refuse(place.partition(".")[0], f"has more than {MAX_NODES:,} values or {MAX_DEPTH} levels")

    def refuse(self, place: str, why: str) -> NoReturn:
        of = place or "the config"
        raise ConfigError(f"{self.where}: {of} {why}. What lies with a run can come from anybody: {self.hint}")


def _short(value: Any) -> str:
    """Of what aliases may blow up, too."""
    words = reprlib.Repr()
    words.maxlevel, words.maxstring, words.maxother = 2, 120, 80
    return words.repr(value)


def _in_record(path: Path) -> bool:
    folder, above, *_ = (*path.parents, path.parent, path.parent)
    if any((place / name).exists() for place in (folder, above) for name in OF_RUN):
        return True
    cell = above.name == "cells" and any((folder / name).exists() for name in ("attempts", "result.json", "lock"))
    return cell or any((place / "plan.json").is_file() and (place / "cells").is_dir() for place in path.parents[:3])
