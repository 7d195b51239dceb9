"""What the fused kernels take of an H100 or H200: registers, spills and shared memory, compiled without a GPU.

    python benchmarks/kernel_ptx.py [--quick] [--json benchmarks/kernel_ptx.json]

Triton compiles for compute capability 9.0, 8.9 and 8.0 offline; ptxas says the rest. The kernels are launched as they
would be, with the tiles in use and tensors of N = 4096, except that nothing runs.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # what comes from a cache says nothing about itself

import torch
import triton
from triton.backends.compiler import GPUTarget

from sagan_attn.kernels import backward, forward, launch

ROOM = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may have
N = 4096
KERNELS = ((forward, "forward"), (backward, "row_sums"), (backward, "of_keys"), (backward, "of_queries"))


@dataclass(frozen=True)
class Form:
    """d, D, and what else is asked for."""

    d: int
    size: int
    dtype: torch.dtype = torch.bfloat16
    columns: bool = True
    capability: int = 90
    extra: str = ""

    def limits(self) -> launch.Limits:
        if self.extra.startswith("position"):  # on a map of so many rows and columns
            sides = torch.empty(1, 1, N, int(self.extra.partition(" ")[2] or 64))
            return launch.Limits(rows=sides, columns=sides)
        if self.extra == "mask":
            return launch.Limits(mask=torch.empty(1, 1, 1, N, dtype=torch.bool))
        if self.extra == "lens":
            return launch.Limits(lens=torch.empty(1, N, dtype=torch.int32))
        if self.extra == "dropout":
            return launch.Limits(dropout=0.1, seed=torch.empty(1, dtype=torch.int64))
        return launch.Limits()


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The shapes of `sagan` with 128, 256, 512 and 1024 channels, `biggan` with 128, 256 and 512; wide heads.
SAGAN = [(16, 128), (32, 256), (64, 512), (128, 1024), (16, 64)]
FORMS = [
    *(Form(d, size, dtype) for dtype in DTYPES for d, size in SAGAN),
    *(Form(d, size) for d, size in ((64, 64), (128, 128), (128, 256))),
    *(Form(8, size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in (16, 32)),
    *(Form(d, size, columns=False) for d, size in SAGAN[:3]),
    *(Form(32, 256, extra=extra) for extra in ("position", "mask", "lens", "dropout", "deterministic")),
    *(Form(32, 256, torch.float32, extra=extra) for extra in ("position", "deterministic")),
    *(Form(d, size, capability=80) for d, size in SAGAN[:4]),
    *(Form(d, size, capability=89) for d, size in SAGAN[:4]),
    *(Form(64, 512, torch.float32, capability=capability) for capability in (80, 89)),
    *(
        Form(d, size, torch.float16, capability=capability)
        for capability in (80, 89)
        for d, size in (*SAGAN[:4], (64, 128), (128, 64), (128, 16))
    ),
    *(Form(32, 256, torch.float16, capability=capability, extra="position 128") for capability in (89, 90)),
    *(Form(32, 256, dtype, capability=capability, extra="position 256") for capability in (89, 90) for dtype in DTYPES),
    *(Form(128, 64, torch.float16, capability=capability, extra="position 256") for capability in (80, 89, 90)),
    *(Form(128, 1024, dtype, capability=89, extra="position 256") for dtype in DTYPES),
    *(Form(32, 256, torch.float16, capability=capability, extra="deterministic") for capability in (80, 89)),
]


said: dict[str, str] = {}


class Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def only_compiled(seen: Callable[..., None]) -> Iterator[None]:
    """Launches compile, and `seen` gets the name, the compiled kernel, ptxas' words and the tiles."""

    class Compiled:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def compiled(*args: Any, **kwargs: Any) -> None:
                with contextlib.redirect_stdout(io.StringIO()) as words:
                    found = self.kernel.warmup(*args, grid=grid, **kwargs)
                said.setdefault(found.hash, words.getvalue())  # nothing about what was compiled before
                seen(self.name, found, said[found.hash], kwargs)

            return compiled

    kernels = [(module, name, getattr(module, name)) for module, name in KERNELS]
    triton.knobs.nvidia.dump_ptxas_log = True
    for module, name, kernel in kernels:
        setattr(module, name, Compiled(kernel, name))
    try:
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def inspect(form: Form) -> list[dict[str, Any]]:
    """A row for each kernel that attention of that form takes, forwards and backwards."""
    rows: list[dict[str, Any]] = []

    def seen(name: str, found: Any, words: str, given: dict[str, Any]) -> None:
        registers, spilled = re.search(r"Used (\d+) registers", words), re.search(r"(\d+) bytes spill stores", words)
        if registers is None or spilled is None:
            raise RuntimeError(f"ptxas said nothing about {name}: {words[:500]!r}")
        parts = "".join(part for part in ("DQ", "DK", "DV") if given.get(part) is not None)
        rows.append(
            {
                "kernel": f"{name} {parts}".strip(),
                "d": form.d,
                "D": form.size,
                "dtype": str(form.dtype).removeprefix("torch."),
                "layout": "columns" if form.columns else "rows",
                "extra": form.extra,
                "capability": form.capability,
                "tiles": {key: given[key] for key in given if key.startswith(("BLOCK", "num_"))},
                "registers": int(registers[1]),
                "spilled_bytes": int(spilled[1]),
                "shared_bytes": found.metadata.shared,
                "tensor_cores": sorted(set(re.findall(r"wgmma|mma\.sync", found.asm["ptx"]))),
            }
        )

    def tensor(size: int) -> torch.Tensor:
        x = torch.empty(1, 1, size, N, dtype=form.dtype).mT
        return x if form.columns else torch.empty(1, 1, N, size, dtype=form.dtype)

    triton.runtime.driver.set_active(Driver(form.capability))  # type: ignore[arg-type]
    query, key, value = tensor(form.d), tensor(form.d), tensor(form.size)
    torch.use_deterministic_algorithms(form.extra == "deterministic", warn_only=True)
    launch._room = lambda device: ROOM[form.capability]
    with only_compiled(seen):
        out, lse = launch.forward(query, key, value, 1.0, form.limits())
        launch.backward(torch.empty_like(out), query, key, value, out, lse, 1.0, form.limits())
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two forms alone")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    forms = [Form(32, 256), replace(Form(16, 64), dtype=torch.float32)] if arguments.quick else FORMS
    rows: list[dict[str, Any]] = []
    for number, form in enumerate(forms, 1):
        started = time.perf_counter()
        found = inspect(form)
        rows += found
        print(f"{number} of {len(forms)}: {form}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        for row in found:
            print(
                *(f"{row[key]:>8}" for key in ("registers", "spilled_bytes", "shared_bytes")), row["kernel"], flush=True
            )
    versions = {name: metadata.version(name) for name in ("torch", "triton")}
    arguments.json.write_text(json.dumps({"versions": versions, "room": ROOM, "kernels": rows}, indent=1) + "\n")
    over = [row for row in rows if row["shared_bytes"] > ROOM[row["capability"]]]
    print(f"{len(rows)} kernels, {sum(row['spilled_bytes'] > 0 for row in rows)} spill, {len(over)} do not fit")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
