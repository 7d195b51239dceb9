"""Out of memory: the note names the graft, its map and what takes less, and what it says is so."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import SMALL
from torch import Tensor, nn

from sagan_attn import graft, grafts_of
from sagan_attn.ablation.cell import _kind
from sagan_attn.blocks import SelfAttention2d
from sagan_attn.errors import DataError
from sagan_attn.training.cli import main
from sagan_attn.training.memory import OutOfMemoryNote, is_out_of_memory, out_of_memory_words

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB")
ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5000000000 bytes.")
MATERIALISED = {"path": "materialised"}


def host() -> nn.Module:
    """Three stages, on maps of 32 x 32, 16 x 16 and 8 x 8 for images of 32 x 32."""
    stages = nn.Sequential()
    for number, (given, channels) in enumerate(((3, 16), (16, 32), (32, 64)), start=1):
        conv = nn.Conv2d(given, channels, 3, padding=1, stride=1 if number == 1 else 2)
        stages.add_module(f"layer{number}", nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()))
    return stages.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(64, 10))


def words(
    at: str = "layer1",
    block: str = "sagan",
    options: dict[str, Any] | None = None,
    batch: int = 64,
    stage: str = "fit",
    network: nn.Module | None = None,
    error: BaseException = ON_GPU,
    precision: str = "32-true",
) -> str:
    """What is said of a run with one graft."""
    if network is None:
        network = host()
        graft(network, at, block=block, example_input=torch.zeros(1, 3, 32, 32), options=options or {})
    data = {"batch_size": batch, "in_channels": 3, "num_workers": 2, "cache_bytes": 1 << 30}
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(**data, preprocess=SimpleNamespace(image_size=32)),
        state=SimpleNamespace(fn=stage),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision=precision,
        accumulate_grad_batches=1,
    )
    error = type(error)(*error.args).with_traceback(error.__traceback__)  # without notes
    OutOfMemoryNote().on_exception(trainer, SimpleNamespace(network=network), error)
    return out_of_memory_words(error)


def weights(said: str) -> float:
    """Bytes of the weights, from the words."""
    found = re.search(r"take ([\d,.]+) (GB|MB)", said)
    assert found is not None, said
    return float(found[1].replace(",", "")) * (1e9 if found[2] == "GB" else 1e6)


@pytest.mark.parametrize(
    ("block", "options", "heads", "keys", "factor"),
    [
        ("sagan", {}, 1, 1024, 1),
        ("biggan", {}, 1, 256, 1),
        ("multihead", {"heads": 8}, 8, 1024, 1),
        ("nonlocal", {"mode": "dot_product"}, 1, 1024, 1),
        ("additive", {}, 1, 1024, 2),  # 16 // 8 features of each pair of positions
        ("decoder", {}, 4, 1024, 1),
    ],
)
def test_the_map_is_as_large_as_said(block: str, options: dict[str, Any], heads: int, keys: int, factor: int):
    said = words(block=block, options=MATERIALISED | options)
    assert said.startswith("out of memory (asked for 2.50 GiB) in training: the largest score map is of graft ")
    of_heads = "" if heads == 1 else f" x {heads} heads"
    name = "nonlocal_" if block == "nonlocal" else block
    assert f"{name!r} at 'layer1', on maps of 32 x 32: the weights of 1,024 queries x {keys:,} keys{of_heads}" in said
    assert weights(said) == pytest.approx(4 * 64 * heads * 1024 * keys * factor, rel=0.05)
    assert "and as much again for the gradients" in said
    assert "as much again" not in words(block=block, options=MATERIALISED | options, stage="test")


def test_what_is_advised_takes_less():
    """Each piece of advice, followed."""
    said = words(options=MATERIALISED)
    assert "trainer.accumulate_grad_batches: 2 for the same update" in said
    assert "data.batch_size: 32 instead of 64" in said
    assert weights(words(options=MATERIALISED, batch=32)) == pytest.approx(weights(said) / 2, rel=0.05)
    assert "options {pool: 2}" in said
    assert weights(words(options=MATERIALISED | {"pool": 2})) == pytest.approx(weights(said) / 4, rel=0.05)
    assert "at: layer2, whose maps of 16 x 16 take 1/16 of it" in said
    assert weights(words("layer2", options=MATERIALISED)) == pytest.approx(weights(said) / 16, rel=0.05)
    assert "options {path: chunked}" in said
    chunked = words(options={"path": "chunked"})
    assert "no graft is large" in chunked
    assert "path 'chunked' never holds them as a whole" in chunked
    assert "options {path: auto}" in words(block="nonlocal", options=MATERIALISED | {"mode": "dot_product"})
    assert "path 'factored' never" in words(block="nonlocal", options={"mode": "dot_product"})
    assert "pool" not in words(block="botnet", options=MATERIALISED)  # it has positions, which need all keys
    assert "accumulate" not in words(options=MATERIALISED, stage="validate")
    assert "batch_size" not in words(options=MATERIALISED, batch=1)


def test_small_grafts_are_not_blamed():
    said = words("layer3", options=MATERIALISED)
    assert "no graft is large: the largest score map is of graft 'sagan' at 'layer3', on maps of 8 x 8" in said
    assert "bf16-mixed" in said
    assert "bf16-mixed" not in words("layer3", precision="bf16-mixed")
    assert "no graft has a score map" in words(block="se")
    assert "no graft has a score map" in words(network=host())
    found = re.search(r"own maps take about ([\d,.]+) MB", said)
    assert found is not None
    per_image = 4 * 3 * 16 * 32 * 32 * (1 + 1 / 2 + 1 / 4)  # convolution, norm and ReLU of each stage
    assert float(found[1]) * 1e6 == pytest.approx(64 * per_image, rel=0.01)
    at_once = re.search(r"own maps take about ([\d,.]+) MB", words(block="se", stage="test"))
    assert at_once is not None
    assert float(at_once[1]) * 1e6 == pytest.approx(64 * 4 * 2 * 16 * 32 * 32, rel=0.01)  # what one takes and gives


def test_auto_is_judged_by_what_it_does_here():
    assert "the largest score map is of graft" in words("layer2", options={"path": "auto"})  # 4 M scores: held
    assert "path 'chunked' never holds them" in words("layer1", options={"path": "auto"})  # 67 M


def test_where_it_was_met_comes_first():
    """With two grafts: the one the error was raised in is named, though the other has the larger map."""
    network = host()
    for at in ("layer1", "layer2"):
        graft(network, at, example_input=torch.zeros(1, 3, 32, 32), options=MATERIALISED)
    assert "graft 'sagan' at 'layer1'" in words(network=network)
    inner = next(one for one in grafts_of(network) if one.site == "layer2")

    def fails(*_: Any) -> None:
        raise ON_CPU

    handle = inner.block.value.register_forward_pre_hook(fails)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="allocate") as raised:
        network(torch.zeros(1, 3, 32, 32))
    handle.remove()
    said = words(network=network, error=raised.value)
    assert said.startswith(f"out of memory (asked for 5.0 GB) in training, met in '{inner.path}.value': the score map ")
    assert "map there is of graft 'sagan' at 'layer2', on maps of 16 x 16" in said


def test_what_is_out_of_memory():
    for error in (ON_GPU, ON_CPU, MemoryError(), RuntimeError("CUDA error: out of memory")):
        assert is_out_of_memory(error)
        assert _kind(error) == "out of memory"  # type: ignore[arg-type]
    for error in (
        RuntimeError("mat1 and mat2 shapes"),
        DataError("can't allocate memory for nothing"),
        OSError(12, "x"),
    ):
        assert not is_out_of_memory(error)
    assert out_of_memory_words(ON_GPU) == "out of memory (asked for 2.50 GiB): a smaller data.batch_size takes less"
    worker = RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{ON_CPU}")
    assert "in a process that loads images: fewer data.num_workers (now 2)" in words(error=worker)

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    assert "what takes the most was not found out" in words(network=Odd())


def test_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    forward = SelfAttention2d.forward

    def fails(block: SelfAttention2d, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if block.training and len(x) == 32 and not x.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return forward(block, x, mask)

    monkeypatch.setattr(SelfAttention2d, "forward", fails)
    assert main(["fit", *SMALL, f"--run_dir={tmp_path / 'run'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: out of memory (asked for 3.00 GiB) in training, met in 'local.act.grafts.sagan': the"
    )
    assert "graft 'sagan' at 'local', on maps of 12 x 12: the weights of 144 queries x 144 keys x 32 images" in line
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr("sagan_attn.training.cli.SaganCLI", lambda *_: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(RuntimeError, match="size"):  # of other kinds nothing is hidden
            main(["fit"])


REAL = """
import resource, sys
from pathlib import Path
from sagan_attn.training.cli import main
import sagan_attn.training.demo, sagan_attn.surgery.cost, torch.utils.flop_counter, torch._dynamo
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3_000_000_000,) * 2)
sys.argv = ["train.py"]
sys.exit(main(sys.argv[:0] + sys.orig_argv[sys.orig_argv.index("fit"):]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts memory as Linux does")
def test_of_a_real_allocator(tmp_path: Path):
    """torch's on the CPU, in a process that may take 3 GB more, for scores of 5.4 GB."""
    grafts = '[{"at": "layer1", "options": {"path": "materialised"}}]'
    arguments = [*SMALL, "--model.host.name=resnet20", "--model.grafts", grafts, f"--run_dir={tmp_path / 'run'}"]
    arguments += ["--data.batch_size=256", "--trainer.precision=32-true", "--trainer.logger=false"]
    done = subprocess.run(
        [sys.executable, "-c", REAL, "fit", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory (asked for 5.4 GB) in training, met in 'layer1.2.grafts.sagan': the")
    assert "on maps of 48 x 48: the weights of 2,304 queries x 2,304 keys x 256 images take 5.4 GB" in line
