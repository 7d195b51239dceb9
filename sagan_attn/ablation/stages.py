"""From the screen to the confirmation: which variants go on."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sagan_attn.ablation.plan import add_stage, chosen_by_name, with_controls
from sagan_attn.ablation.spec import Spec
from sagan_attn.errors import ConfigError

__all__ = ["add_confirm", "cells_of"]


def cells_of(plan: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    return [cell for cell in plan["cells"] if cell["stage"] == stage]


def add_confirm(plan: dict[str, Any], spec: Spec, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Add the stage `confirm` for the variants that the screen chose and their controls; returns the chosen ones.

    Chosen are those of the highest mean validation accuracy at the screen's largest budget; one that diverged for any
    seed is not among them. Raises `ConfigError` when the screen is not complete.
    """
    missing = {cell["key"] for cell in cells_of(plan, "screen")} - {result["key"] for result in results}
    if missing:
        raise ConfigError(f"the screen lacks {len(missing)} cells: `confirm` waits for them")
    if isinstance(spec.confirm.choose, int):
        budget = max(plan["stages"]["screen"]["budgets"])
        means = {}
        for name, variant in plan["variants"].items():
            own = [r for r in results if r["variant"] == name and r["budget"] == budget and r["stage"] == "screen"]
            if variant["kind"] == "variant" and all(r["outcome"] == "finished" for r in own):
                means[name] = statistics.mean(r["metrics"]["val/accuracy"] for r in own)
        if not means:
            raise ConfigError("every variant of the screen diverged: there is nothing to confirm")
        chosen = sorted(means, key=lambda name: -means[name])[: spec.confirm.choose]
    else:
        chosen = [name for name in chosen_by_name(plan, spec) if plan["variants"][name]["kind"] == "variant"]
    add_stage(plan, spec, spec.confirm, with_controls(plan, chosen))
    return chosen
