"""Promise 4 with several processes: DDP trains a grafted model as one process trains it on all images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosts import ANY_HOST, Host, count_calls, open_gates
from roads import FOUR, mostly_slow
from torch import Tensor, distributed, nn

from sagan_attn import graft, grafts_of

WORKER = """
import sys
import torch
import torch.distributed as dist
from test_promise_processes import GATE, STEPS, build, images_of, loss_of, optimizer_of
from hosts import ANY_HOST, count_calls
from sagan_attn import graft, grafts_of
from sagan_attn.errors import GraftError

torch.set_num_threads(1)
rank, folder, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
host = ANY_HOST[name]
model = build(host, seed=rank, gate=0.0 if rank else GATE)  # DDP hands out those of rank 0
calls = [count_calls(g.block) for g in grafts_of(model)]
wrapped = torch.nn.parallel.DistributedDataParallel(model)
optimizer = optimizer_of(wrapped)
for step in range(STEPS):
    optimizer.zero_grad()
    loss_of(wrapped, images_of(host, step, rank)).backward()
    optimizer.step()
assert [len(c) for c in calls] == [STEPS] * len(calls)
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
try:
    graft(wrapped, f"module.{host.sites[0]}", name="second", example_input=host.images())
except GraftError as error:
    assert "wrapped in DistributedDataParallel" in str(error)
else:
    raise SystemExit("a wrapped model was grafted into")
dist.destroy_process_group()
"""
STEPS, GATE = 2, 0.5


def build(host: Host, seed: int, gate: float) -> nn.Module:
    """Float64, so that the order of the sums does not matter; in eval mode, where no image sees another."""
    model = host.build().double()
    if hasattr(model, "unused"):
        del model.unused  # DDP wants every parameter used
    open_gates(graft(model, list(host.sites), example_input=host.images(), seed=seed), gate)
    return model


def images_of(host: Host, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 3, host.size, host.size, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", *FOUR])
def test_two_processes(name: str, tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    here = Path(__file__).resolve()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, here.parents[:3]))}
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path), name], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    state, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    host = ANY_HOST[name]
    model = build(host, seed=0, gate=GATE)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([loss_of(model, images_of(host, step, rank)) for rank in range(2)]).mean().backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], other[key]), key
        torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-9, msg=key)
    grafted = [key for key in state if ".grafts." in key and key.endswith("weight")]
    assert grafted
    assert all(not torch.equal(state[key], start[key]) for key in grafted)


@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR), "tiny", "mambaout"))
def test_a_group_of_one_process_gives_the_gradients_of_the_plain_model(name: str, tmp_path: Path):
    host = ANY_HOST[name]
    model, plain = (build(host, seed=0, gate=GATE) for _ in range(2))
    calls = [count_calls(g.block) for g in grafts_of(model)]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped, images_of(host, 0, 0)).backward()
    finally:
        distributed.destroy_process_group()
    assert [len(c) for c in calls] == [1] * len(calls)
    loss_of(plain, images_of(host, 0, 0)).backward()
    for (key, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=key)
