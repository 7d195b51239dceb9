"""The report of an ablation: a page, tables and figures, made from its folder alone."""

from pathlib import Path

from sagan_attn.ablation.analysis import Analysis
from sagan_attn.ablation.report.flat import run_records, summary_records
from sagan_attn.ablation.report.paper import paper_files
from sagan_attn.ablation.report.tables import csv_text
from sagan_attn.ablation.store import own_folder
from sagan_attn.files import write_whole

__all__ = ["write_report"]


def write_report(folder: Path, analysis: Analysis, *, html: Path | None = None, paper: bool = False) -> list[Path]:
    """Write report.html, table.csv, runs.csv, figures/ and, if asked for, paper/ into `<folder>/report`; their paths.

    Each file is written whole, the page last. html: where to write the page instead.

    Raises:
        ConfigError: a paper is asked for and nothing is confirmed; a folder of the report is a link.
        OSError: a file cannot be written; those written before stay.
    """
    from sagan_attn.ablation.report.figures import draw, image_files
    from sagan_attn.ablation.report.html import page

    report = folder / "report"
    at = html or report / "report.html"
    files = {
        report / "table.csv": csv_text(summary_records(analysis)).encode(),
        report / "runs.csv": csv_text(run_records(analysis)).encode(),
    }
    if paper:
        files |= {report / "paper" / name: text.encode() for name, text in paper_files(analysis).items()}
    svgs = {}
    for name, figure in draw(analysis).items():
        images = image_files(figure)
        svgs[name] = images["svg"]
        files |= {report / "figures" / f"{name}.{kind}": data for kind, data in images.items()}
    files[at] = page(analysis, svgs, folder, at.parent).encode()
    for path, data in files.items():
        for inside in (report, path.parent):
            if inside.is_relative_to(report):
                own_folder(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    return list(files)
