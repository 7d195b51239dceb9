"""`python -m sagan_attn bench block|step|data|scaling`: how long attention takes, and how much memory.

Times are medians of interleaved readings on fresh random data; JSON files hold the spread as well.
"""

import argparse
import importlib
import os

__all__ = ["add_arguments", "run"]

# Each is a module bench_<name> beside this one.
BENCHES = {
    "block": "the block against its peers, shape by shape",
    "scaling": "time and memory against the number of positions",
    "step": "a training step of a host without and with grafts",
    "data": "images a second of the data path",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="<bench>")
    for name, description in BENCHES.items():
        bench = benches.add_parser(name, help=description, description=description)
        module = importlib.import_module(f"sagan_attn.commands.bench_{name}")
        module.add_arguments(bench)
        bench.set_defaults(run_bench=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. Raises `ConfigError`, `BlockError`, `GraftError` or `DataError` for what cannot be."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks about itself
    if arguments.keep_freed_memory:
        from sagan_attn.training.allocator import keep_freed_memory

        keep_freed_memory()
    return arguments.run_bench(arguments)
