"""A fault at any step of `load_grafts` leaves the host as it was."""

from pathlib import Path
from typing import Any

import pytest
from hosts import Tiny, assert_unchanged, rng_states, snapshot
from stored import HOST, IMAGE
from torch import nn

from sagan_attn import grafts_of
from sagan_attn.surgery import build, graft_file, plan, probe, store
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.store import load_grafts


class FaultError(BaseException):
    """Raised by no code but these tests, and caught by none, as what a signal raises."""


STEPS: list[tuple[Any, str]] = [
    (store, "read_grafts"),
    (graft_file, "_read"),
    (graft_file, "_content"),
    (graft_file, "_tensors"),
    (graft_file, "_digest"),
    (graft_file, "_entry"),
    (store, "_check_distinct"),
    (store, "_makers"),
    (store, "check_block"),
    (store, "check_name"),
    (store, "build_block"),
    (store, "_check_tensors"),
    (store, "_check_names"),
    (store, "_paths"),
    (store, "locate"),
    (plan, "check_anchor"),
    (plan, "probe"),
    (probe, "quiet"),
    (probe, "_like_parameters"),
    (Tiny, "forward"),
    (plan, "maps_of"),
    (plan, "check_calls"),
    (store, "_check_maps"),
    (store, "insertion"),
    (plan, "build_block"),
    (build, "create_block"),
    (plan, "check_identity"),
    (plan, "spec_of"),
    (nn.Module, "load_state_dict"),
    (store, "carry_out"),
    (points_, "insert"),
    (points_.GraftPoint, "__init__"),
    (nn.Module, "add_module"),
]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda part: getattr(part, "__name__", part))
def test_a_fault_at_any_step(owner: Any, name: str, call: int, saved: Path, monkeypatch: pytest.MonkeyPatch):
    """At the first or the second time that the step is taken."""
    model = HOST.build().train()
    before, random = snapshot(model), rng_states()
    real, calls = getattr(owner, name), []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise FaultError
        return real(*args, **options)

    monkeypatch.setattr(owner, name, fail)
    try:
        load_grafts(model, saved, example_input=IMAGE)
    except FaultError:
        assert_unchanged(model, before)
    else:
        assert call == 2
        assert len(calls) == 1
        assert [g.name for g in grafts_of(model)] == ["sagan", "nonlocal_"]
    monkeypatch.undo()
    assert calls
    assert rng_states() == random


@pytest.mark.parametrize("call", [1, 2])
def test_a_fault_while_the_hook_is_registered(call: int, saved: Path, monkeypatch: pytest.MonkeyPatch):
    model = HOST.build()
    before, real, calls = snapshot(model), nn.Module.register_forward_hook, []

    def fail(module: nn.Module, hook: Any, **options: Any) -> Any:
        if hook is points_.run_grafts:
            calls.append(1)
            if len(calls) == call:
                raise FaultError
        return real(module, hook, **options)

    monkeypatch.setattr(nn.Module, "register_forward_hook", fail)
    with pytest.raises(FaultError):
        load_grafts(model, saved, example_input=IMAGE)
    assert_unchanged(model, before)
