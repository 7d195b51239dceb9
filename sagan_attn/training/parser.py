"""The parser of the training command line, which looks at where a config comes from before it reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, Unset, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from sagan_attn.training.class_paths import check_file

__all__ = ["ConfigParser", "null_is_a_value"]


class ConfigParser(LightningArgumentParser):
    """Refuses a config from a run folder or an ablation's that names other classes than `class_paths.ALLOWED`.

    Nor does it read a file named like a value: of `strategy: auto`, the default, Lightning's own parser makes whatever
    class a file `auto` in the working directory names.
    """

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """A file given with `--config`. Raises `ConfigError`."""
        check_file(path, fitting=getattr(self, "subcommand", "fit") == "fit")
        return super().parse_path(path, *args, **kwargs)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's, without configs in files for single arguments."""
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})


@contextmanager
def null_is_a_value() -> Iterator[None]:
    """Inside, null is checked against an argument's type; jsonargparse else takes it for any argument's absence."""
    before = ArgumentParser().add_argument("--probe").default is Unset
    set_parsing_settings(unset_sentinel=True)
    try:
        yield
    finally:
        set_parsing_settings(unset_sentinel=before)
