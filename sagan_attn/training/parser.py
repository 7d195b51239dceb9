"""The parser of the training command line, which looks at where a config comes from before it reads it."""

import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

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

    def print_usage(self, file: Any = None) -> None:
        """Nothing before an error: the usage would be seventy lines above the one that says what is wrong."""
        if file is not sys.stderr:
            super().print_usage(file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As jsonargparse's, with the name that was perhaps meant."""
        unknown = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([^=\s]+)", message)
        near = difflib.get_close_matches(unknown[1] or unknown[2], self._names(), 1) if unknown else []
        super().error(f"{message}; did you mean {near[0]!r}?" if near else message, ex)

    def _names(self) -> list[str]:
        """Of all options, of the subcommands too."""
        parsers = getattr(self._subcommands_action, "choices", None) or {}
        return [action.dest for parser in (self, *parsers.values()) for action in parser._actions]

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's, without configs in files for single arguments."""
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})


@contextmanager
def null_is_a_value() -> Iterator[None]:
    """Inside, null is checked against an argument's type; jsonargparse else takes it for any argument's absence."""
    probe = ArgumentParser()
    probe.add_argument("--probe")
    before = probe.get_default("probe") is Unset
    set_parsing_settings(unset_sentinel=True)
    try:
        yield
    finally:
        set_parsing_settings(unset_sentinel=before)
