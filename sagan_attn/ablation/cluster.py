"""Cells on a Ray cluster: the same folder, which every machine sees, the same locks, the same resume."""

import importlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sagan_attn.ablation.runner import POLL, Cell, Progress, to_compute
from sagan_attn.ablation.store import Store, valid_results
from sagan_attn.errors import ConfigError

__all__ = ["run_on_ray"]


def run_on_ray(
    store: Store,
    cells: Sequence[Cell],
    address: str,
    say: Callable[[str], None],
    *,
    share: float = 1.0,
    retry_failed: bool = False,
    same_code: bool = False,
) -> bool:
    """`run_cells` with a task of Ray Core for each cell, which starts a process of its own.

    address: of the cluster; "auto" for the one this machine belongs to, "local" for a new one on this machine alone.
    share: of a GPU, where the cluster has any, or else of a core, that a cell takes. Raises `ConfigError` where Ray
    is not installed or the cluster does not answer.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'sagan_attn[ray]'") from error
    missing = to_compute(store, cells, say, retry_failed=retry_failed, same_code=same_code)
    if not missing:
        return {cell["key"] for cell in cells} <= valid_results(store)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning", include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray {address}: no cluster answers: {error}") from error
    try:
        there = ray.cluster_resources()
        resources: dict[str, Any] = {"num_cpus": 0, "num_gpus": share} if there.get("GPU") else {"num_cpus": share}
        at_a_time = max(1, int((there.get("GPU") or there.get("CPU", 1)) / share))
        compute = ray.remote(max_retries=0, **resources)(_compute)
        progress = Progress(store, len(missing), at_a_time, say)
        say(f"Ray: {at_a_time} cells at a time on {len(ray.nodes())} machines")
        _drain(ray, compute, store, progress, missing)
    finally:
        ray.shutdown()  # which ends the tasks, but not the cluster
    return {cell["key"] for cell in cells} <= valid_results(store)


def _drain(ray: Any, compute: Any, store: Store, progress: Progress, missing: Sequence[Cell]) -> None:
    folder = str(store.folder.resolve())
    queue, running, elsewhere = deque(missing), {}, []
    while queue or running or elsewhere:
        while queue:
            cell = queue.popleft()
            running[compute.remote(folder, cell["key"])] = cell
        ready, _ = ray.wait(list(running), timeout=POLL) if running else ([], [])
        for reference in ready:
            cell = running.pop(reference)
            try:
                code, seconds = ray.get(reference)
            except ray.exceptions.RayError:  # its machine is gone
                code, seconds = -9, 0.0
            what = progress.ended(cell, code, seconds)
            if what != "done":
                (queue if what == "again" else elsewhere).append(cell)
        for cell in [cell for cell in elsewhere if not store.is_locked(cell["key"])]:
            elsewhere.remove(cell)
            if not progress.taken_over(cell):
                queue.append(cell)
        if elsewhere and not running:
            time.sleep(POLL)


def _compute(folder: str, key: str) -> tuple[int, float]:
    """Exit code and seconds of a cell's process, on whichever machine this runs."""
    started = time.monotonic()
    store = Store(folder)
    store.cell(key).mkdir(parents=True, exist_ok=True)
    code = subprocess.call([sys.executable, "-m", "sagan_attn.ablation.cell", folder, key], env=dict(os.environ))
    return code, time.monotonic() - started
