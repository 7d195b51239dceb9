"""The command line `python -m sagan_attn <command>`, also installed as `sagan-attn`."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sagan_attn.errors import ConfigError, SaganAttnError, one_line

__all__ = ["COMMANDS", "main"]

# Each is a module of sagan_attn.commands, imported when it is asked for.
COMMANDS = {
    "sites": "where a block can go in a model, and what it would cost there",
    "ablate": "compare variants over seeds, with controls: one YAML in, a table with intervals and a verdict out",
    "report": "the report of an ablation, from its folder alone: table, page, figures, paper",
    "predict": "classes of images by a trained model: tables and a contact sheet",
    "compare": "two runs on the same test images: paired test, changed images, costs",
    "export": "a trained model as ONNX, torch.export program or safetensors, checked, with classes and preprocessing",
    "maps": "what the attention of a trained model looks at: sheets, figures of its heads, a page on each site",
    "explore": "one HTML page: point at an image and see what attention looks at from there",
    "bench": "how long attention takes and how much memory, beside what would be used instead",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or with one line on stderr 2 for what is refused, 1 for failures.

    `--help` raises `SystemExit(0)`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="sagan-attn", description="Self-attention for CNNs you already have.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        if name in arguments:
            module = importlib.import_module(f"sagan_attn.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    try:
        options = parser.parse_args(arguments)
        code = options.run(options)
        sys.stdout.flush()
        return code
    except SaganAttnError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, no permission
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
