"""Stands in for the process of a cell: no training, but the same files, locks and exit codes."""

import json
import os
import signal
import time
from pathlib import Path

from sagan_attn.ablation.store import BUSY, FAILED, Store


def result_of(cell: dict) -> dict:
    metrics = {"val/accuracy": 0.5, "val/loss": 1.0, "train/loss": 1.0, "test/accuracy": 0.5, "test/loss": 1.0}
    return {"format": 1, **cell, "outcome": "finished", "metrics": metrics, "cost": {}, "provenance": {"code": "a"}}


def main(folder: str, key: str, threads: int, environ: dict[str, str], log: str) -> None:
    """Behaves as `cells/<key>/behaviour` says: "", "crash", "oom", "die" or "once" (dies the first time)."""
    store = Store(folder)
    behaviour = store.file(key, "behaviour")
    how = behaviour.read_text() if behaviour.is_file() else ""
    with store.lock(key) as free:
        if not free:
            os._exit(BUSY)
        store.count_attempt(key, f"{os.getpid()} {threads} {environ.get('CUDA_VISIBLE_DEVICES')}")
        if how == "crash" or how == "oom":
            store.write_failure(key, {"oom": "out of memory"}.get(how, "refused"), "ValueError: no good")
            os._exit(FAILED)
        if how == "die" or (how == "once" and store.attempts(key) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "slow":
            time.sleep(300)
        (cell,) = [c for c in json.loads(Path(store.plan).read_text())["cells"] if c["key"] == key]
        store.write(store.file(key, "result.json"), result_of(cell))
