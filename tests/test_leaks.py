"""What is done over and over leaves nothing behind: tensors, modules, hooks, other objects, threads, files, memory."""

import ctypes
import gc
import logging
import os
import platform
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from hosts import Tiny, assert_unchanged, open_gates, snapshot
from small_runs import SMALL
from torch import nn

from sagan_attn import fuse, graft, grafts_of, load_grafts, record_attention, save_grafts, ungraft
from sagan_attn.training.cli import SaganCLI, main
from sagan_attn.training.quiet import quieten

IMAGE = torch.zeros(1, 3, 32, 32)
BLOCKS = {"stage": "multihead", "top": {"block": "sagan", "pool": 2}}
MIB = 1 << 20
GLIBC = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


class Held(NamedTuple):
    """What the process holds, garbage apart. memory: resident bytes; the rest are counts."""

    tensors: int
    modules: int
    hooks: int
    objects: int
    allocations: int
    threads: int
    files: int
    memory: int


def held() -> tuple[int, ...]:
    """The numbers of `Held`, in a tuple that the garbage collector does not count.

    What has been freed is given back to the system first: how much of it the C library keeps goes up and down.
    """
    gc.collect()
    if GLIBC is not None:
        GLIBC.malloc_trim(0)
    there = gc.get_objects()
    modules = [one for one in there if issubclass(type(one), nn.Module)]
    return (
        sum(issubclass(type(one), torch.Tensor) for one in there),
        len(modules),
        sum(len(value) for one in modules for name, value in vars(one).items() if name.endswith("hooks")),
        len(there),
        sys.getallocatedblocks(),
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def growth(seen: list[tuple[int, ...]]) -> Held:
    """From the first to the last look; of the memory, by the slope of a line through all."""
    slope = statistics.linear_regression(range(len(seen)), [float(one[-1]) for one in seen]).slope
    counts = [last - first for first, last in zip(seen[0], seen[-1], strict=True)]
    return Held(*counts[:-1], memory=round(slope * (len(seen) - 1)))


@contextmanager
def only_what_is_new() -> Iterator[None]:
    """Inside, the garbage collector passes over everything made before, which takes it most of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def repeat(make: Callable[[Path], Callable[[], Any]], folder: Path, cycles: int, warm: int, looks: int = 4) -> Held:
    """Growth over so many cycles, after some that fill caches."""
    with only_what_is_new():
        step = make(folder)
        for _ in range(warm):
            step()
        seen = [held()]
        for _ in range(looks):
            for _ in range(cycles // looks):
                step()
            seen.append(held())
    return growth(seen)


def assert_nothing_stays(found: Held, cycles: int, memory: int) -> None:
    """Less than one object in ten cycles, or ten, which is what caches and the looking itself may hold."""
    assert (found.tensors, found.modules, found.hooks, found.threads, found.files) == (0, 0, 0, 0, 0), found
    assert found.objects <= max(cycles / 10, 10), found
    assert found.allocations <= max(cycles, 1000), found
    assert found.memory <= memory, found


def grafting(folder: Path) -> Callable[[], Any]:
    model = Tiny().eval()

    def step() -> None:
        graft(model, BLOCKS, example_input=IMAGE)
        model(IMAGE)
        ungraft(model)

    return step


def grafted() -> nn.Module:
    model = Tiny().eval()
    open_gates(graft(model, BLOCKS, example_input=IMAGE))
    return model


def recording(folder: Path) -> Callable[[], Any]:
    model = grafted()

    def step() -> None:
        with record_attention(model) as recorded:
            model(IMAGE)
        assert [len(calls) for calls in recorded.values()] == [1, 1]

    return step


def saving(folder: Path) -> Callable[[], Any]:
    model = grafted()

    def step() -> None:
        save_grafts(model, folder / "grafts.safetensors")
        ungraft(model)
        load_grafts(model, folder / "grafts.safetensors", example_input=IMAGE)

    return step


def fusing(folder: Path) -> Callable[[], Any]:
    model = grafted()
    return lambda: fuse(model)(IMAGE)


def training(folder: Path) -> Callable[[], Any]:
    """A loss, its gradient and a step of the optimizer."""
    model = grafted().train()
    optimizer = torch.optim.AdamW(grafts_of(model).param_groups(lr=1e-3))

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()

    return step


KINDS = [grafting, recording, saving, fusing, training]


@pytest.mark.parametrize("make", KINDS)
def test_a_few_cycles(make: Callable[[Path], Callable[[], Any]], tmp_path: Path):
    assert_nothing_stays(repeat(make, tmp_path, 20, warm=3), cycles=20, memory=16 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
def test_a_thousand_cycles(make: Callable[[Path], Callable[[], Any]], tmp_path: Path):
    found = repeat(make, tmp_path, 1000, warm=50, looks=10)
    print(found)
    assert_nothing_stays(found, cycles=1000, memory=2 * MIB)


@pytest.mark.slow
def test_a_thousand_ungrafts_give_the_host_back():
    model = Tiny().eval()
    before = snapshot(model)
    for _ in range(1000):
        graft(model, BLOCKS, example_input=IMAGE)
        ungraft(model)
    assert_unchanged(model, before)


class Looks(L.Callback):
    """At the same batch of each epoch but the first two."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 50 and trainer.current_epoch >= 2:
            self.seen.append(held())


class Watched(SaganCLI):
    looks: Looks

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        self.looks = Looks()
        trainer.callbacks.append(self.looks)  # type: ignore[attr-defined]
        return trainer


@pytest.mark.slow
def test_a_run_of_a_thousand_steps(tmp_path: Path):
    """With validation, logs and checkpoints after each hundred."""
    small = ["--data.n_train=800", "--data.batch_size=8", "--data.n_val=16", "--trainer.max_epochs=10"]
    with only_what_is_new():
        run = Watched(["fit", *SMALL, *small, "--run_dir", str(tmp_path / "run")])
    assert run.trainer.global_step == 1000
    assert len(run.looks.seen) == 8
    found = growth(run.looks.seen)
    print(found)
    assert_nothing_stays(found, cycles=700, memory=4 * MIB)


@pytest.mark.slow
def test_several_runs_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps each record
    seen = []
    for number in range(8):
        assert main(["fit", *SMALL, "--data.n_train=32", "--run_dir", str(tmp_path / str(number))]) == 0
        seen.append(held())
    found = growth(seen[3:])
    print(found)
    assert_nothing_stays(found, cycles=40, memory=4 * MIB)  # 40: fewer than one object a run


def test_what_every_run_sets_is_set_once():
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
    quieten()
    before = [len(logging.getLogger(name).filters) for name in names]
    quieten()
    assert [len(logging.getLogger(name).filters) for name in names] == before


# memory is that of the whole process, in which what other tests have freed may be taken again
@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=() if what in ("tensors", "hooks") else pytest.mark.slow) for what in Held._fields],
)
def test_a_leak_is_found(what: str, tmp_path: Path):
    kept: list[Any] = []
    done = threading.Event()

    def leaking(folder: Path) -> Callable[[], Any]:
        block = nn.Identity()
        return lambda: leak(block)

    def leak(block: nn.Module) -> None:
        if what == "hooks":
            block.register_forward_hook(lambda *_: None)
        elif what == "threads":
            kept.append(threading.Thread(target=done.wait))
            kept[-1].start()
        elif what == "memory":
            kept.append(b"x" * (4 * MIB))
        else:
            made = {"tensors": lambda: torch.zeros(1), "modules": nn.Identity, "objects": dict}
            made |= {"allocations": lambda: bytes(100), "files": lambda: os.open(tmp_path, os.O_RDONLY)}
            kept.append([made[what]() for _ in range(1000 if what == "allocations" else 1)])

    try:
        found = repeat(leaking, tmp_path, 20, warm=1)
        with pytest.raises(AssertionError, match=what):
            assert_nothing_stays(found, cycles=20, memory=16 * MIB)
    finally:
        done.set()
        if what == "files":
            for (handle,) in kept:
                os.close(handle)
    at_least = {"allocations": 20_000, "memory": 30 * MIB}.get(what, 20)
    assert getattr(found, what) >= at_least
