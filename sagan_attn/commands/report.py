"""`python -m sagan_attn report <folder>`: what an ablation found, from its folder alone."""

import argparse
import sys
from pathlib import Path

import numpy as np

from sagan_attn.errors import ConfigError, one_line

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of `ablate`; the report goes into its folder report/")
    parser.add_argument(
        "--paper", action="store_true", help="also report/paper/: LaTeX table, methods, raw runs as CSV"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also the table, a row a variant, as CSV there")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="the same as Parquet (needs sagan_attn[report])")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page there instead of report/report.html")


def run(arguments: argparse.Namespace) -> int:
    """Print the table and write the report. Returns 1 where files were left out, named on stderr.

    Raises `ConfigError` for a folder that holds no ablation, and for what cannot be written.
    """
    from sagan_attn.ablation.analysis import analyse
    from sagan_attn.ablation.report import write_report
    from sagan_attn.ablation.report.flat import summary_records
    from sagan_attn.ablation.report.tables import csv_text, parquet_bytes, print_report
    from sagan_attn.ablation.store import read_logits, read_plan, read_results
    from sagan_attn.files import write_whole

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    problems: list[str] = []

    def logits(key: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
        try:
            return read_logits(folder, key, "test" if split == "test" else "val")
        except ConfigError as error:
            problems.append(str(error))
            return None

    plan = read_plan(folder)
    results, failures, found = read_results(folder)
    problems += found
    analysis = analyse(plan, results, failures, logits, problems)
    records = summary_records(analysis)
    try:
        written = write_report(folder, analysis, html=arguments.html, paper=arguments.paper)
        if arguments.csv:
            write_whole(arguments.csv, csv_text(records).encode())
        if arguments.parquet:
            write_whole(arguments.parquet, parquet_bytes(records))
    except OSError as error:
        raise ConfigError(f"the report cannot be written, and the results are as they were: {error}") from error
    finally:  # last, as the reader of a pipe may have seen enough, and also where writing failed
        print_report(analysis)
    print(f"\n{one_line(written[-1])}")
    for problem in analysis.problems:
        print(one_line(f"left out: {problem}"), file=sys.stderr)
    return 1 if analysis.problems else 0
