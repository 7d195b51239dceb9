"""The results as flat records: one a variant, and one a run. Shares stay shares; nothing is rounded."""

import math
from collections.abc import Mapping
from typing import Any

from sagan_attn.ablation.analysis import Analysis
from sagan_attn.ablation.comparisons import KNOCKOUTS
from sagan_attn.ablation.statistics import Interval

__all__ = ["run_records", "summary_records"]


def summary_records(analysis: Analysis) -> list[dict[str, Any]]:
    """One record for each variant of each stage and budget; all have the same keys."""
    records = []
    for group in analysis.groups:
        for row in group.rows:
            record = {
                "stage": group.stage,
                "budget": group.budget,
                "metric": group.metric,
                "baseline": group.baseline,
                "variant": row.variant.name,
                "label": row.variant.label,
                "kind": row.variant.kind,
                "planned": len(row.cells),
                **{state: row.count(state) for state in ("finished", "diverged", "failed", "missing")},
                "added": sum(cell.added for cell in row.cells),
                "mean": row.mean,
                "run_sd": row.sd,
                **_interval("difference", row.difference),
                "p_adjusted": row.p,
                "outcome": row.outcome,
                "correlation": None if row.correlation is None or math.isnan(row.correlation) else row.correlation,
                "detectable": row.detectable,
                **_interval("new_images", row.images),
                "strongest_control": group.strongest,
                **_interval("over_control", row.against),
                "over_control_p_adjusted": row.against_p,
            }
            for name in KNOCKOUTS:
                record |= _interval(f"cost_{name}", row.knocked.get(name))
            record["used"] = row.used
            record |= {name: row.cost.get(name) for name in ("parameters", "flops", "images_per_second", "peak_bytes")}
            record["train_seconds"] = row.cost.get("train_seconds")
            record["note"] = "; ".join(filter(None, [row.why_none, row.why_no_images]))
            records.append(record)
    return records


def run_records(analysis: Analysis) -> list[dict[str, Any]]:
    """One record a cell; all have the same keys, None where a cell has no such value."""
    records: dict[str, dict[str, Any]] = {}
    for cell in analysis.cells:  # a cell of several families is one run
        records[cell.key] = {
            "key": cell.key,
            "stage": cell.stage,
            "budget": cell.budget,
            "variant": cell.variant,
            "seed": cell.seed,
            "added": cell.added,
            "state": cell.state,
            **cell.metrics,
            **_named("knockout", cell.knockouts),
            **_named("gamma", cell.gammas),
            **_named("branch_share", cell.branch_shares),
            **_named("cost", cell.cost),
            **_named("provenance", _flat(cell.provenance)),
            "error": cell.error,
        }
    keys = dict.fromkeys(key for record in records.values() for key in record if key != "error")
    return [{key: record.get(key) for key in (*keys, "error")} for record in records.values()]


def _interval(name: str, of: Interval | None) -> dict[str, float | int | None]:
    parts = ("mean", "low", "high", "sd", "n")
    return {f"{name}_{part}": None if of is None else getattr(of, part) for part in parts}


def _named(prefix: str, of: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in of.items()}


def _flat(of: Mapping[str, Any]) -> dict[str, str | None]:
    """As text, so that a column has one type."""
    flat: dict[str, str | None] = {}
    for name, value in of.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": str(each) for inner, each in value.items()}
        else:
            flat[str(name)] = None if value is None else str(value)
    return flat
