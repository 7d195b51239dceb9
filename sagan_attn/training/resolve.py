"""A training config checked and completed, as `fit` would take it, without running it."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from sagan_attn.errors import ConfigError, SaganAttnError
from sagan_attn.training.cli import SaganCLI
from sagan_attn.training.data import ImageData
from sagan_attn.training.hosts import host_preprocess
from sagan_attn.training.module import ClassifierModule

__all__ = ["Resolved", "resolve_config"]

KEPT = ("_subcommand_method_arguments",)


@dataclass(frozen=True)
class Resolved:
    """A config with every default filled in, and what it makes.

    Args:
        config: seed_everything, trainer, model and data.
        trainer_defaults: the trainer's arguments that were left out or given as they are by default.
        model: not yet built: see `ClassifierModule`.
        data: not yet set up.
    """

    config: dict[str, Any]
    trainer_defaults: dict[str, Any]
    model: ClassifierModule
    data: ImageData


class _Resolver(SaganCLI):
    """A `fit` that stops before a trainer is made."""

    _made: ClassVar[dict[str, Any]] = {}  # the parsers, which take most of the time and do not change

    def setup_parser(self, *arguments: Any, **options: Any) -> None:
        if not self._made:
            super().setup_parser(*arguments, **options)
            self._made.update({name: value for name, value in vars(self).items() if "parser" in name or name in KEPT})
        vars(self).update(self._made)

    def init_parser(self, **kwargs: Any) -> Any:
        return super().init_parser(**kwargs, exit_on_error=False)

    def _set_seed(self) -> None:
        """The config is only looked at."""

    def before_instantiate_classes(self) -> None:
        """Precision stays as given: the machine that trains chooses it."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None is made."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    def resolved(self) -> Resolved:
        saved = self._saved_config()
        saved.pop("run_dir", None)
        trainer = self._parser("fit").get_defaults().trainer.as_dict()
        preprocess = host_preprocess(self.model.host)
        if preprocess is not None:
            self.datamodule.use_preprocess(preprocess)
        return Resolved(saved, trainer, self.model, self.datamodule)


def resolve_config(config: Mapping[str, Any], where: str) -> Resolved:
    """Check a training config, given as its YAML file would say it.

    Raises `ConfigError` or another of the library's errors, naming `where` and what is wrong: an unknown key, a value
    of another type, an option that the model or the data refuse.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: a training config must be a mapping of keys, not {type(config).__name__}")
    try:
        return _Resolver(["fit", "--config", yaml.safe_dump(dict(config))]).resolved()
    except (argparse.ArgumentError, TypeError, RecursionError, SystemExit, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    except SaganAttnError as error:
        raise type(error)(f"{where}: {error}") from error
