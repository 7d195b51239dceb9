"""The cells of a plan with what became of each: results and failures checked against the plan, nothing guessed.

A record that contradicts the plan is named and left out, so its cell counts as missing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sagan_attn.errors import ConfigError

__all__ = ["KINDS", "METRICS", "Cell", "Variant", "cells_of", "number", "variants_of"]

KINDS = ("baseline", "control", "variant")
METRICS = {"screen": "val/accuracy", "confirm": "test/accuracy"}  # what a stage is judged by
FORMAT = 1


@dataclass(frozen=True)
class Variant:
    """One way of training, as the plan describes it, and the name of the one it is compared with.

    parameters and flops are of the whole model, flops of one image.
    """

    name: str
    label: str
    kind: str
    baseline: str
    settings: Mapping[str, Any]
    parameters: float | None
    flops: float | None


@dataclass(frozen=True)
class Cell:
    """One run of the plan. `state`: "finished", "diverged", "failed" (no result, an error) or "missing".

    `accuracy` is by the metric of the stage, None unless finished. `curves`: one dict an epoch.
    """

    key: str
    stage: str
    budget: int
    variant: str
    seed: int
    added: bool
    state: str = "missing"
    accuracy: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[Mapping[str, float]] = ()
    gammas: Mapping[str, float] = field(default_factory=dict)
    branch_shares: Mapping[str, float] = field(default_factory=dict)
    knockouts: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def variants_of(plan: Mapping[str, Any]) -> dict[str, Variant]:
    """The plan's variants by name, in its order. Raises `ConfigError` for a plan without them or their baselines."""
    described = plan.get("variants")
    if not isinstance(described, Mapping) or not described:
        raise ConfigError("the plan names no variants; it is not one of an ablation")
    variants = {}
    for name, of in described.items():
        if not isinstance(of, Mapping) or of.get("kind") not in KINDS:
            raise ConfigError(f"variant {name!r} of the plan must have a kind of {', '.join(KINDS)}")
        settings = of.get("settings")
        variants[name] = Variant(
            name,
            str(of.get("label") or name),
            of["kind"],
            str(of.get("baseline") or plan.get("baseline")),
            settings if isinstance(settings, Mapping) else {},
            number(of.get("parameters")),
            number(of.get("flops")),
        )
    for variant in variants.values():
        if variant.baseline not in variants:
            raise ConfigError(f"the baseline {variant.baseline!r} of {variant.name!r} is none of the plan's variants")
    return variants


def cells_of(plan: Mapping[str, Any], results: Sequence[Any], failures: Sequence[Any]) -> tuple[list[Cell], list[str]]:
    """Every cell of the plan in its order, and a line for each record that was left out.

    Raises `ConfigError` for a plan that lists no cells, or two with one key.
    """
    cells: dict[str, Cell] = {}
    listed = plan.get("cells")
    if not isinstance(listed, list) or not listed:
        raise ConfigError("the plan lists no cells; it is not one of an ablation")
    for index, of in enumerate(listed):
        cell = _planned(of, index, plan["variants"])
        if cell.key in cells:
            raise ConfigError(f"the plan lists two cells with key {cell.key!r}")
        cells[cell.key] = cell
    problems: list[str] = []
    seen: set[str] = set()
    for result in results:
        key = result.get("key") if isinstance(result, Mapping) else None
        if not isinstance(key, str) or key not in cells:
            problems.append(f"result of cell {key!r} is not in the plan: left out")
        elif key in seen:
            problems.append(f"two results have key {key!r}: the first is kept")
        else:
            seen.add(key)
            wrong = _contradiction(cells[key], result)
            if wrong:
                problems.append(f"result of cell {key!r} {wrong}: left out")
            else:
                cells[key] = _with_result(cells[key], result)
    for failure in failures:
        key = failure.get("key") if isinstance(failure, Mapping) else None
        if not isinstance(key, str) or key not in cells:
            problems.append(f"failure of cell {key!r} is not in the plan: left out")
        elif cells[key].state == "missing":  # a result that came later counts
            text = f"{failure.get('kind') or 'failed'}: {failure.get('message') or 'no message'}"
            attempts = number(failure.get("attempts"))
            more = f" ({attempts:.0f} attempts)" if attempts and attempts > 1 else ""
            cells[key] = _changed(cells[key], state="failed", error=text + more)
    return list(cells.values()), problems


def _planned(of: Any, index: int, variants: Mapping[str, Any]) -> Cell:
    kinds = {"key": str, "stage": str, "budget": int, "variant": str, "seed": int}
    if not isinstance(of, Mapping) or not all(type(of.get(name)) is kind for name, kind in kinds.items()):
        raise ConfigError(f"cell {index} of the plan must have {', '.join(kinds)}")
    if of["stage"] not in METRICS or of["variant"] not in variants:
        raise ConfigError(f"cell {index} of the plan has an unknown stage or variant: {of['stage']}, {of['variant']}")
    return Cell(*(of[name] for name in kinds), added=of.get("added") is True)


def _contradiction(cell: Cell, result: Mapping[str, Any]) -> str:
    """What is wrong with a result, or nothing."""
    if result.get("format") != FORMAT:
        return f"has format {result.get('format')!r}, not {FORMAT}"
    for name in ("stage", "budget", "variant", "seed"):
        if result.get(name) != getattr(cell, name):
            return f"has {name} {result.get(name)!r}, the plan {getattr(cell, name)!r}"
    if result.get("outcome") not in ("finished", "diverged"):
        return f"has outcome {result.get('outcome')!r}, neither finished nor diverged"
    if result["outcome"] == "finished":
        metrics = result.get("metrics")
        accuracy = number(metrics.get(METRICS[cell.stage])) if isinstance(metrics, Mapping) else None
        if accuracy is None or not 0 <= accuracy <= 1:
            return f"is finished without a {METRICS[cell.stage]} between 0 and 1"
    return ""


def _with_result(cell: Cell, result: Mapping[str, Any]) -> Cell:
    finished = result["outcome"] == "finished"
    metrics = _numbers(result.get("metrics"))
    evidence, curves, provenance = (result.get(name) for name in ("evidence", "curves", "provenance"))
    shares = {graft: of.get("branch_share") for graft, of in _items(evidence) if isinstance(of, Mapping)}
    return _changed(
        cell,
        state=result["outcome"],
        accuracy=metrics[METRICS[cell.stage]] if finished else None,
        metrics=metrics,
        curves=tuple(_numbers(epoch) for epoch in curves) if isinstance(curves, list) else (),
        gammas=_numbers(result.get("gammas")),
        branch_shares=_numbers(shares),
        knockouts=_numbers(result.get("knockouts")),
        cost=_numbers(result.get("cost")),
        provenance=provenance if isinstance(provenance, Mapping) else {},
    )


def _changed(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{**vars(cell), **changes})


def _items(of: Any) -> list[tuple[str, Any]]:
    return list(of.items()) if isinstance(of, Mapping) else []


def _numbers(of: Any) -> dict[str, float]:
    """The finite numbers of an object; what is no number is left out."""
    found = {str(name): number(value) for name, value in _items(of)}
    return {name: value for name, value in found.items() if value is not None}
