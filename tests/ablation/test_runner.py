"""The runner: computes what is missing and nothing else, whatever happens to it and to its cells."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_cells
import pytest

from sagan_attn.ablation.runner import Workers, run_cells
from sagan_attn.ablation.store import Store, read_logits, read_plan, read_results
from sagan_attn.errors import ConfigError

CELLS = [
    {"key": f"{i:016x}", "stage": "confirm", "budget": 1, "variant": "none", "seed": i, "added": False}
    for i in range(4)
]
PLAN = {"format": 1, "variants": {"none": {"kind": "baseline"}}, "cells": CELLS}
KEYS = [cell["key"] for cell in CELLS]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "ablation")
    store.write(store.plan, PLAN)
    return store


def behave(store: Store, index: int, how: str) -> None:
    store.cell(KEYS[index]).mkdir(parents=True, exist_ok=True)
    store.file(KEYS[index], "behaviour").write_text(how)


def run(store: Store, workers: int = 2, **how: Any) -> tuple[bool, list[str]]:
    lines: list[str] = []
    done = run_cells(store, CELLS, Workers(workers), lines.append, target=fake_cells.main, **how)
    return done, lines


def test_what_is_missing_is_computed_once(store: Store):
    store.write(store.file(KEYS[1], "result.json"), fake_cells.result_of(CELLS[1]))
    done, lines = run(store)
    assert done
    assert [store.attempts(key) for key in KEYS] == [1, 0, 1, 1]
    assert lines[0] == "1 of 4 cells are there already"
    assert "left" not in lines[-1]
    assert run(store) == (True, [])


def test_a_cell_that_dies_is_run_again_and_one_that_keeps_dying_stays_visible(store: Store):
    behave(store, 0, "once")
    behave(store, 1, "die")
    behave(store, 2, "oom")
    behave(store, 3, "crash")
    done, lines = run(store)
    assert not done
    assert [store.attempts(key) for key in KEYS] == [2, 3, 3, 1]  # what is refused is refused again
    results, failures, problems = read_results(store.folder)
    assert [result["key"] for result in results] == KEYS[:1]
    assert [failure["kind"] for failure in failures] == ["killed", "out of memory", "refused"]
    assert not problems
    assert any("FAILED (ValueError: no good)" in line for line in lines)
    done, lines = run(store)
    assert not done
    assert lines[0] == "1 failed before: --retry-failed runs them again"
    assert [store.attempts(key) for key in KEYS] == [2, 6, 6, 1]  # what was killed may have been bad luck
    for index in (1, 2, 3):
        behave(store, index, "")
    assert run(store, retry_failed=True)[0]
    assert read_results(store.folder)[1] == []


RUNNER = """
import sys
import fake_cells
from sagan_attn.ablation.runner import Workers, run_cells
from sagan_attn.ablation.store import Store, read_plan
if __name__ == "__main__":
    store = Store(sys.argv[1])
    try:
        run_cells(store, read_plan(store.folder)["cells"], Workers(1), print, target=fake_cells.main)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture
def runner(store: Store, tmp_path: Path) -> Any:
    """Starts a runner in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(RUNNER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return lambda: subprocess.Popen([sys.executable, script, store.folder], env={**os.environ, "PYTHONPATH": path})


@pytest.mark.slow
def test_two_runners_share_the_cells_and_one_that_is_interrupted_stops_its_own(store: Store, runner: Any):
    behave(store, 0, "slow")
    first = runner()
    while not store.attempts(KEYS[0]):
        assert first.poll() is None
        time.sleep(0.05)
    second = runner()  # leaves the first cell to the other
    while not all(store.has_result(key) for key in KEYS[1:]):
        assert second.poll() is None
        time.sleep(0.05)
    assert [store.attempts(key) for key in KEYS] == [1, 1, 1, 1]
    assert store.is_locked(KEYS[0])
    behave(store, 0, "")
    first.send_signal(signal.SIGTERM)
    assert first.wait(90) == 130
    assert second.wait(90) == 0  # takes it over
    assert store.attempts(KEYS[0]) == 2
    assert store.has_result(KEYS[0])


def test_devices_and_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers = Workers(4, ["0", "3"], None)
    assert [workers.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "3", "0", "3"]
    assert Workers(1, (), 3).threads_of_one() == 3
    assert Workers(10_000).threads_of_one() == 1


def test_same_code(store: Store):
    store.write(store.file(KEYS[0], "result.json"), fake_cells.result_of(CELLS[0]))
    with pytest.raises(ConfigError, match=f"1 results in .* other code .*{KEYS[0]}"):
        run(store, same_code=True)


BROKEN = {
    "cannot be read": "{",
    "holds no mapping": "[]",
    "format 2, this version reads 1": {"format": 2},
    "is of another cell: 'x'": {"key": "x"},
    "seed is 7": {"seed": 7},
    "outcome 'won'": {"outcome": "won"},
    "no metrics": {"metrics": None},
    "validation accuracy None": {"metrics": {}},
    "which code computed it": {"provenance": {}},
}


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_and_foreign_results_are_named_and_left_out(store: Store, problem: str):
    change = BROKEN[problem]
    text = change if isinstance(change, str) else json.dumps(fake_cells.result_of(CELLS[0]) | change)
    path = store.file(KEYS[0], "result.json")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    results, failures, (said,) = read_results(store.folder)
    assert (results, failures) == ([], [])
    assert str(path) in said
    assert problem in said


def test_a_damaged_result_is_set_aside_and_computed_again(store: Store):
    path = store.file(KEYS[0], "result.json")
    path.parent.mkdir(parents=True)
    path.write_text("{half")
    done, lines = run(store)
    assert done
    assert "its result cannot be used, and is now" in lines[0]
    assert path.with_name("result.json.bad-1").read_text() == "{half"
    assert len(read_results(store.folder)[0]) == 4


def test_devices_are_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert Workers(2, ["0", "1"]).environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-abc"}


def test_only_one_plans(store: Store, tmp_path: Path):
    new = Store(tmp_path / "new")
    with pytest.raises(ConfigError), new.planning():
        raise ConfigError("no good")
    assert not new.folder.exists()
    with store.planning():
        pass
    assert store.plan.is_file()


def test_foreign_folders(store: Store, tmp_path: Path):
    (store.folder / "cells" / "other").mkdir(parents=True)
    assert "other is no cell of the plan" in read_results(store.folder)[2][0]
    with pytest.raises(ConfigError, match="holds no ablation"):
        read_plan(tmp_path)
    for text, problem in (("{", "cannot be read"), ("{}", "format None"), ('{"format": 1}', "not the plan")):
        store.plan.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            read_plan(store.folder)
    store.plan.write_text(json.dumps({**PLAN, "cells": [{"key": "../../etc", "variant": "none"}]}))
    with pytest.raises(ConfigError, match="is no cell"):
        read_plan(store.folder)


def test_damaged_logits(store: Store):
    assert read_logits(store.folder, KEYS[0], "val") is None
    path = store.file(KEYS[0], "logits.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match="is damaged"):
        read_logits(store.folder, KEYS[0], "val")
