"""The folder of an ablation: what is in it, read with suspicion and written whole.

    .plan.lock                 held by the process that makes or changes the plan
    plan.json                  variants, cells and configs, frozen; see `plan.py`
    cells/<key>/config.yaml    the training config of the cell
    cells/<key>/attempts       a line each time the cell was started
    cells/<key>/log.txt        what its process printed, all attempts
    cells/<key>/metrics.csv    a row an epoch
    cells/<key>/result.json    what came out, once it is complete
    cells/<key>/failure.json   why there is no result
    cells/<key>/logits.safetensors   float16 logits and labels, "val/..." and in `confirm` "test/..."
    cells/<key>/lock           held by the process that computes the cell; the system frees it when that one dies
    report/                    see `report`

Nothing read from it is run: JSON and safetensors, of sizes with a limit. Links are not followed where something is
appended or a folder is written to: the folder may come from anybody.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from sagan_attn.errors import ConfigError
from sagan_attn.files import read_text, remove_leftovers, write_whole

__all__ = [
    "BUSY",
    "DONE",
    "FAILED",
    "FORMAT",
    "Store",
    "own_folder",
    "pack_logits",
    "read_logits",
    "read_plan",
    "read_results",
    "valid_results",
]

FORMAT = 1
DONE, FAILED, BUSY = 0, 3, 75  # exit codes of a cell's process; 75: another process computes it
PLAN_LOCK = ".plan.lock"
OUTCOMES = ("finished", "diverged")
APPENDED = ("attempts", "lock", "log.txt")  # files of a cell that are not replaced as a whole
JSON_BYTES = 100_000_000


class Store:
    """The folder of an ablation."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.plan = self.folder / "plan.json"
        self.report = self.folder / "report"

    def cell(self, key: str) -> Path:
        return self.folder / "cells" / key

    def file(self, key: str, name: str) -> Path:
        return self.cell(key) / name

    def has_result(self, key: str) -> bool:
        return self.file(key, "result.json").is_file()

    def has_failed(self, key: str) -> bool:
        return self.file(key, "failure.json").is_file() and not self.has_result(key)

    def prepare(self, key: str) -> Path:
        """The folder of a cell, made if it is not there.

        Raises `ConfigError` for a link that would be followed out of it, or another thing in the way, by name.
        """
        folder = own_folder(self.cell(key))
        for path in (folder / name for name in APPENDED):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ConfigError(f"{path} is no plain file: take it away, as what is written there would go elsewhere")
        return folder

    def write(self, path: Path, content: Any) -> None:
        """JSON as a whole file. Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def write_config(self, key: str, config: Mapping[str, Any]) -> Path:
        path = self.prepare(key) / "config.yaml"
        write_whole(path, yaml.safe_dump(dict(config), sort_keys=False).encode())
        return path

    def attempts(self, key: str) -> int:
        """How often the cell was started."""
        path = self.file(key, "attempts")
        return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0

    def count_attempt(self, key: str, text: str) -> None:
        handle = os.open(self.file(key, "attempts"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        with open(handle, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def write_failure(self, key: str, kind: str, message: str) -> None:
        """Say why a cell has no result. On a full disk not even that: the cell then just stays missing."""
        content = {"format": FORMAT, "key": key, "kind": kind, "message": message, "attempts": self.attempts(key)}
        with suppress(OSError):
            self.write(self.file(key, "failure.json"), content)

    def sweep(self, key: str) -> None:
        """Remove what a killed attempt was writing. Only for who has the lock of the cell."""
        remove_leftovers(self.cell(key))

    def set_aside(self, key: str) -> Path:
        """Rename a damaged or foreign result, so that the cell is missing; where it is now."""
        path = self.file(key, "result.json")
        number = next(n for n in itertools.count(1) if not path.with_name(f"result.json.bad-{n}").exists())
        return path.rename(path.with_name(f"result.json.bad-{number}"))

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Only one process reads, changes and writes the plan at a time; the others wait. A new folder for which no
        plan comes out is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / PLAN_LOCK
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        except BaseException:
            if [path.name for path in self.folder.iterdir()] == [PLAN_LOCK]:
                lock.unlink()
                self.folder.rmdir()
            raise
        finally:
            os.close(handle)

    @contextmanager
    def lock(self, key: str) -> Iterator[bool]:
        """Whether this process alone may compute the cell while inside; another one that has the lock keeps it."""
        handle = os.open(self.prepare(key) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)  # and with it the lock

    def is_locked(self, key: str) -> bool:
        if not self.file(key, "lock").is_file():
            return False
        with self.lock(key) as free:
            return not free


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json. Raises `ConfigError` where there is none, or none of this library's."""
    store = Store(folder)
    if not store.plan.is_file():
        raise ConfigError(f"{folder} holds no ablation: plan.json is missing")
    plan = _json(store.plan)
    if isinstance(plan, str):
        raise ConfigError(f"{store.plan} {plan}")
    if plan.get("format") != FORMAT:
        raise ConfigError(f"{store.plan} has format {plan.get('format')!r}, this version reads {FORMAT}")
    cells, variants = plan.get("cells"), plan.get("variants")
    if not isinstance(cells, list) or not isinstance(variants, dict):
        raise ConfigError(f"{store.plan} is not the plan of an ablation: cells or variants are missing")
    for cell in cells:
        if not isinstance(cell, dict) or not _is_key(cell.get("key")) or not _is_one_of(cell.get("variant"), variants):
            raise ConfigError(f"{store.plan} is not the plan of an ablation: {cell!r:.100} is no cell")
    return plan


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Results and failures of the plan's cells, and what is wrong with other files there, by name.

    A result that is damaged, of another cell or of another format is a problem and no result.
    """
    store, results, failures, problems = Store(folder), [], [], []
    cells = {cell["key"]: cell for cell in read_plan(folder)["cells"]}
    for key, cell in cells.items():
        for name, found in (("result.json", results), ("failure.json", failures)):
            path = store.file(key, name)
            if path.is_file() and not (name == "failure.json" and store.has_result(key)):
                content = _json(path)
                problem = content if isinstance(content, str) else _unfit(content, cell, name)
                if problem:
                    problems.append(f"{path} {problem}")
                else:
                    found.append(content)
    folder_of_cells = store.folder / "cells"
    if folder_of_cells.is_dir():
        foreign = sorted(path.name for path in folder_of_cells.iterdir() if path.name not in cells)
        problems += [f"{folder_of_cells / name} is no cell of the plan" for name in foreign]
    return results, failures, problems


def read_logits(folder: Path, key: str, split: Literal["val", "test"]) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits [N, classes] and labels [N] of a cell, in float16 and int64; None where they are not stored.

    Raises `ConfigError` for a damaged file, and for one of other tensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Store(folder).file(key, "logits.safetensors")
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # the last two: of other dtypes
        raise ConfigError(f"{path} is damaged: {error}") from error
    if said.get("sha256", found := _digest(tensors)) != found:
        raise ConfigError(f"{path} is damaged: its sha256 is {found}, {said['sha256']} is required")
    logits, labels = (tensors.get(f"{split}/{name}") for name in ("logits", "labels"))
    if logits is None and labels is None:
        return None
    if logits is None or labels is None:
        raise ConfigError(f"{path} is damaged: it has {split} logits or labels alone")
    if logits.dtype != np.float16 or labels.dtype != np.int64 or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ConfigError(f"{path} is damaged: it has logits {logits.dtype} {logits.shape} of {labels.shape} images")
    return logits, labels


def pack_logits(tensors: dict[str, np.ndarray]) -> bytes:
    """The file that `read_logits` reads, of "<split>/logits" and "<split>/labels"."""
    from safetensors.numpy import save

    return save(tensors, {"sha256": _digest(tensors)})  # of several keys safetensors does not keep the order


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor, by sorted name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def own_folder(path: Path) -> Path:
    """A folder, made if it is not there. Raises `ConfigError` for a link to another one."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a link: take it away, as what is written there would go elsewhere")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _json(path: Path) -> dict[str, Any] | str:
    """The mapping in a file, or what is wrong with it."""
    try:
        content = json.loads(read_text(path, JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    return content if isinstance(content, dict) else "holds no mapping"


def _unfit(content: Mapping[str, Any], cell: Mapping[str, Any], name: str) -> str:
    """What is wrong with a result or failure; "" if nothing is."""
    if content.get("format") != FORMAT:
        return f"has format {content.get('format')!r}, this version reads {FORMAT}"
    if content.get("key") != cell["key"]:
        return f"is of another cell: {content.get('key')!r:.40}"
    if name == "failure.json":
        return "" if isinstance(content.get("message"), str) else "does not say why the cell failed"
    for field in ("stage", "budget", "variant", "seed"):
        if content.get(field) != cell[field]:
            return f"is of another cell: {field} is {content.get(field)!r:.40}, the plan has {cell[field]!r}"
    if content.get("outcome") not in OUTCOMES:
        return f"has outcome {content.get('outcome')!r:.40}, which is none of {', '.join(OUTCOMES)}"
    metrics = content.get("metrics")
    provenance = content.get("provenance")
    if not isinstance(metrics, dict) or not isinstance(content.get("cost"), dict):
        return "has no metrics or no cost"
    if not isinstance(provenance, dict) or not isinstance(provenance.get("code"), str):
        return "does not say which code computed it"
    accuracy = metrics.get("val/accuracy")
    number = isinstance(accuracy, (int, float)) and math.isfinite(accuracy)
    return "" if number or content["outcome"] == "diverged" else f"has the validation accuracy {accuracy!r:.40}"


def valid_results(store: Store) -> set[str]:
    """Keys of the cells that have a whole result of their own."""
    return {result["key"] for result in read_results(store.folder)[0]}


def _is_one_of(name: Any, names: Mapping[str, Any]) -> bool:
    return isinstance(name, str) and name in names


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and len(key) == 16 and all(c in "0123456789abcdef" for c in key)
