"""Keep what ablations found, as measured: benchmarks/ablations/<name>.json, -runs.csv, -forest.png, and RESULTS.md.

    python benchmarks/results.py [--data "CIFAR-10, a JPEG copy"] [<folder of an ablation> ...]

--data says in words what folders of images given by --set were. RESULTS.md is written anew from all files in
benchmarks/ablations.
"""

import argparse
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from sagan_attn.ablation.analysis import Analysis, analyse
from sagan_attn.ablation.report import write_report
from sagan_attn.ablation.report.columns import COLUMNS
from sagan_attn.ablation.report.flat import run_records, summary_records
from sagan_attn.ablation.report.tables import csv_text, status_words
from sagan_attn.ablation.store import read_logits, read_plan, read_results

HERE = Path(__file__).parent
KEPT = HERE / "ablations"
SHOWN = (
    *("variant", "runs", "accuracy %", "difference, points", "p", "over strongest control", "its p"),
    *("difference on new images", "the branch disabled: cost", "uniform weights: cost", "keys of another image: cost"),
    *("branch", "gamma", "parameters", "note"),
)
START = """# Results

What the ablations of this repository found, as measured, nulls included; made by `benchmarks/results.py` from the
files in `benchmarks/ablations`. Differences are paired by seed, in percentage points of test accuracy at the last epoch
[95 % t interval over seeds]; p is adjusted by max-t over all comparisons of the stage. Costs are what accuracy on the
validation part loses when the trained branch is disabled, its weights are made uniform, or its keys are taken from
another image.
"""


def read(folder: Path) -> tuple[Analysis, dict[str, Any], list[dict[str, Any]]]:
    plan = read_plan(folder)
    results, failures, problems = read_results(folder)

    def logits(key: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
        return read_logits(folder, key, "test" if split == "test" else "val")

    return analyse(plan, results, failures, logits, problems), plan, results


def without_places(content: Any) -> Any:
    """The same without paths of this machine."""
    if isinstance(content, dict):
        return {key: without_places(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    return "<folder>" if isinstance(content, str) and Path(content).is_absolute() else content


def keep(folder: Path, data: str | None) -> None:
    """The files of one ablation."""
    analysis, plan, results = read(folder)
    if not analysis.quotable:
        print(f"{folder} may not be quoted yet: {'; '.join(analysis.why_not)}")
    write_report(folder, analysis)
    KEPT.mkdir(exist_ok=True)
    started = min(result["provenance"]["started"] for result in results)
    finished = max(result["provenance"]["finished"] for result in results)
    hours = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds() / 3600
    first = results[0]["provenance"]
    content = {
        "name": analysis.name,
        "spec": plan["spec"],
        "set": without_places(plan["set"]),
        "data": data,
        "machine": {key: first[key] for key in ("machine", "device", "threads", "versions", "git", "code")},
        "started": started,
        "finished": finished,
        "hours": hours,
        "runs": len(results),
        "status": status_words(analysis),
        "groups": [
            {
                "title": group.title,
                "stage": group.stage,
                "budget": group.budget,
                "verdict": group.verdict,
                "marks": list(group.marks),
                "rows": [{c.header: c.text(row) for c in COLUMNS} | {"kind": row.variant.kind} for row in group.rows],
            }
            for group in analysis.groups
        ],
        "summary": summary_records(analysis),
    }
    text = json.dumps(content, indent=1)
    (KEPT / f"{analysis.name}.json").write_text(text + "\n", encoding="utf-8")
    (KEPT / f"{analysis.name}-runs.csv").write_text(csv_text(run_records(analysis)), encoding="utf-8")
    for figure in sorted((folder / "report" / "figures").glob("forest*.png")):
        shutil.copy(figure, KEPT / f"{analysis.name}-{figure.name}")


def page() -> str:
    """RESULTS.md."""
    lines = [START]
    for path in sorted(KEPT.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine"]
        lines += [f"## {content['name']}", ""]
        lines += ["```yaml", content["spec"].strip(), "```", ""]
        lines += [
            (f"Data: {content['data']}. " if content.get("data") else "")
            + f"{content['runs']} runs in {content['hours']:.1f} hours from {content['started'][:10]} on, on a machine "
            f"that did other work too; {machine['machine']}, torch {machine['versions']['torch']}, code of revision "
            f"{(machine['git'] or 'unknown')[:12]}. Every run: `benchmarks/ablations/{path.stem}-runs.csv`.",
            "",
        ]
        lines += [line for status in content["status"] for line in (status, "")]
        for group in content["groups"]:
            if group["stage"] == "screen":
                lines += [f"### {group['title']} (chooses, and is not to be quoted)", ""]
            else:
                lines += [f"### {group['title']}", "", group["verdict"], ""]
            headers = [header for header in SHOWN if any(row.get(header, "-") != "-" for row in group["rows"])]
            lines += ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
            lines += ["| " + " | ".join(row[header] for header in headers) + " |" for row in group["rows"]]
            lines += ["", *[line for mark in group["marks"] for line in (f"Note: {mark}", "")]]
        lines += [
            line
            for picture in sorted(KEPT.glob(f"{path.stem}-forest*.png"))
            for line in (f"![Paired differences](benchmarks/ablations/{picture.name})", "")
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--data")
    options = parser.parse_args()
    for folder in options.folders:
        keep(folder, options.data)
    (HERE.parent / "RESULTS.md").write_text(page(), encoding="utf-8")
    print("RESULTS.md is written; python benchmarks/readme.py takes its verdicts into the README")


if __name__ == "__main__":
    main()
