"""Runs the cells that are missing, each in a process of its own, and can be killed at any moment.

Nothing is kept in memory that is not in the folder: a runner that is started again, on this machine or on another one
that sees the folder, computes what has no result. A cell's process holds the cell's lock, not the runner, so a cell
whose runner died is left to finish.
"""

import multiprocessing
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Literal

from sagan_attn.ablation.provenance import code_digest
from sagan_attn.ablation.store import BUSY, DONE, FAILED, Store, read_results, valid_results
from sagan_attn.errors import ConfigError

__all__ = ["Progress", "Workers", "run_cells", "to_compute"]

STAYS = ("crash", "refused")  # failures that would come again; what was killed or out of memory may not
ATTEMPTS = 3  # in one call, of a cell whose process dies or runs out of memory
POLL = 2.0  # seconds between looks at cells that another runner computes
GRACE = 20.0  # seconds a cell gets to end when the runner is interrupted

Cell = dict[str, Any]


@dataclass(frozen=True)
class Workers:
    """Where cells run.

    Args:
        count: how many at a time.
        devices: numbers of CUDA devices that they share in turn; none for the CPU, or whatever the config says.
        threads: of a process; None for an equal share of the cores.
    """

    count: int = 1
    devices: Sequence[str] = ()
    threads: int | None = None

    def environment(self, slot: int) -> dict[str, str]:
        if not self.devices:
            return {}
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        device = self.devices[slot % len(self.devices)]
        return {"CUDA_VISIBLE_DEVICES": visible[int(device)] if visible else device}

    def threads_of_one(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.count)


@dataclass
class Progress:
    """What becomes of cells whose process has ended, and one line about each, with the time that is left."""

    store: Store
    total: int
    workers: int
    say: Callable[[str], None]
    done: int = 0
    seconds: list[float] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)

    def ended(self, cell: Cell, code: int, seconds: float) -> Literal["done", "again", "elsewhere"]:
        """What to do about a cell whose process ended with that exit code (below 0: killed by a signal)."""
        key = cell["key"]
        if code == BUSY:
            return "elsewhere"
        if code == DONE and self.store.has_result(key):
            self.finished(cell, "done", seconds)
            return "done"
        if code == FAILED and not self.store.has_failed(key):
            self.finished(cell, f"no room to write; see {self.store.file(key, 'log.txt')}", seconds)
            return "done"
        self.deaths[key] = self.deaths.get(key, 0) + 1
        failure = next((one for one in read_results(self.store.folder)[1] if one["key"] == key), None)
        kind = failure["kind"] if failure else "killed"
        if kind != "refused" and self.deaths[key] < ATTEMPTS:
            self.store.file(key, "failure.json").unlink(missing_ok=True)
            self.say(f"{name_of(cell)}: {kind}, attempt {self.deaths[key]} of {ATTEMPTS}; once more")
            return "again"
        if failure is None and code != FAILED:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.store.write_failure(key, "killed", f"the process ended with {how}")
        why = failure["message"].splitlines()[0] if failure else "its process died"
        self.finished(cell, f"FAILED ({why}); see {self.store.file(key, 'log.txt')}", seconds)
        return "done"

    def taken_over(self, cell: Cell) -> bool:
        """Whether another runner has done the cell."""
        done = self.store.has_result(cell["key"])
        if done:
            self.finished(cell, "computed by another runner")
        return done

    def finished(self, cell: Cell, how: str, seconds: float | None = None) -> None:
        self.done += 1
        took = rest = ""
        if seconds is not None:
            self.seconds.append(seconds)
            took = f" ({_duration(seconds)})"
        if self.seconds and self.done < self.total:
            left = statistics.median(self.seconds) * (self.total - self.done) / self.workers
            rest = f"; about {_duration(left)} left"
        self.say(f"[{self.done}/{self.total}] {name_of(cell)}: {how}{took}{rest}")


def run_cells(
    store: Store,
    cells: Sequence[Cell],
    workers: Workers,
    say: Callable[[str], None],
    *,
    retry_failed: bool = False,
    same_code: bool = False,
    target: Callable[..., None] | None = None,
) -> bool:
    """Compute the cells without a result. Returns whether all of them have one now.

    say: takes a line for the terminal. A cell that crashed or was refused stays so unless
    `retry_failed`. target: runs in the process
    of a cell; None for `cell.main`.

    Raises:
        ConfigError: `same_code`, and results of other code are there.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the cells under way have been stopped.
    """
    missing = to_compute(store, cells, say, retry_failed=retry_failed, same_code=same_code)
    if missing:
        _Pool(store, workers, Progress(store, len(missing), workers.count, say), target).run(missing)
    return {cell["key"] for cell in cells} <= valid_results(store)


def to_compute(
    store: Store, cells: Sequence[Cell], say: Callable[[str], None], *, retry_failed: bool, same_code: bool
) -> list[Cell]:
    """The cells without a whole result, but for those that failed by their own fault unless these are to be tried
    again. See `run_cells`."""
    if same_code:
        _check_code(store)
    have = valid_results(store)
    missing = [cell for cell in cells if cell["key"] not in have]
    for cell in missing:
        if store.has_result(cell["key"]):
            say(f"{name_of(cell)}: its result cannot be used, and is now {store.set_aside(cell['key'])}")
    kinds = {failure["key"]: failure["kind"] for failure in read_results(store.folder)[1]}
    failed = [cell for cell in missing if kinds.get(cell["key"]) in STAYS]
    for cell in missing:
        if retry_failed or cell not in failed:
            store.file(cell["key"], "failure.json").unlink(missing_ok=True)
    if failed and not retry_failed:
        say(f"{len(failed)} failed before: --retry-failed runs them again")
        missing = [cell for cell in missing if cell not in failed]
    if missing:
        say(f"{sum(cell['key'] in have for cell in cells)} of {len(cells)} cells are there already")
    return missing


class _Pool:
    """So many processes at a time, of cells waiting in a queue."""

    def __init__(
        self, store: Store, workers: Workers, progress: Progress, target: Callable[..., None] | None = None
    ) -> None:
        if target is None:
            from sagan_attn.ablation.cell import main as target  # imports all that training needs
        self.store, self.workers, self.progress, self.target = store, workers, progress, target
        # new processes are copies of one that has imported everything, and has not run anything
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["sagan_attn.ablation.store", target.__module__])
        self.running: dict[Any, tuple[Cell, int, float]] = {}  # process -> cell, slot, when it began

    def run(self, cells: Sequence[Cell]) -> None:
        queue = deque(cells)
        elsewhere: list[Cell] = []
        with _interruptible():
            try:
                while queue or self.running or elsewhere:
                    while queue and len(self.running) < self.workers.count:
                        cell = queue.popleft()
                        if not self.progress.taken_over(cell):
                            self._start(cell)
                    wait([process.sentinel for process in self.running], timeout=POLL)
                    for process in [process for process in self.running if not process.is_alive()]:
                        self._reap(process, queue, elsewhere)
                    for cell in [cell for cell in elsewhere if not self.store.is_locked(cell["key"])]:
                        elsewhere.remove(cell)
                        if not self.progress.taken_over(cell):
                            queue.append(cell)
            finally:
                self._stop()

    def _start(self, cell: Cell) -> None:
        slots = {slot for _, slot, _ in self.running.values()}
        slot = next(slot for slot in range(self.workers.count) if slot not in slots)
        key = cell["key"]
        self.store.prepare(key)
        arguments = (
            str(self.store.folder),
            key,
            self.workers.threads_of_one(),
            self.workers.environment(slot),
            str(self.store.file(key, "log.txt")),
        )
        process = self.context.Process(target=self.target, args=arguments)
        process.start()
        self.running[process] = cell, slot, time.monotonic()

    def _reap(self, process: Any, queue: deque[Cell], elsewhere: list[Cell]) -> None:
        cell, _, since = self.running.pop(process)
        code = process.exitcode
        process.close()
        what = self.progress.ended(cell, code, time.monotonic() - since)
        if what != "done":
            (queue if what == "again" else elsewhere).append(cell)

    def _stop(self) -> None:
        """End what still runs, at once where it does not end by itself."""
        for process in self.running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in self.running:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _check_code(store: Store) -> None:
    now = code_digest()
    others = [result["key"] for result in read_results(store.folder)[0] if result["provenance"]["code"] != now]
    if others:
        raise ConfigError(
            f"{len(others)} results in {store.folder} were computed with other code (such as that of cell {others[0]}"
            "): --same-code refuses to mix them; take them away, or go without"
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what SIGINT does, so that cells are stopped and not left behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def name_of(cell: Cell) -> str:
    return f"{cell['variant']}, {cell['budget']} epochs, seed {cell['seed']}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
