"""Lightning's own cost: an epoch of `train.py fit` against a bare PyTorch loop that does the same steps.

    python benchmarks/lightning_overhead.py

The same network, data, augmentation, optimizer and schedule; the epochs of the two are timed in turn, first the one and
then the other in front, without validation. Batch 4 gives steps of about 10 ms on two cores. Both start from the same
seed, and their last weights are compared to show it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
import yaml
from machine import save, summary
from timed_cli import TimedCLI

from sagan_attn.training.allocator import keep_freed_memory
from sagan_attn.training.data import LookupData
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.optim import OptimizerConfig, ScheduleConfig, create_optimizer, create_schedule

CONFIG = Path(__file__).parents[1] / "configs" / "lookup.yaml"
MODEL = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
HOST = HostConfig(**MODEL["host"])
GRAFTS = [GraftConfig(**graft) for graft in MODEL["grafts"]]
OPTIMIZER = OptimizerConfig(**MODEL["optimizer"])
SCHEDULE = ScheduleConfig(**MODEL["schedule"] | {"warmup_epochs": 0.3})


def through_the_cli(images: int, batch: int, folder: Path) -> TimedCLI:
    return TimedCLI(
        [
            "fit", "--config", str(CONFIG), "--run_dir", str(folder), "--trainer.max_epochs=1",
            "--trainer.limit_val_batches=0", "--trainer.precision=32-true", "--trainer.accelerator=cpu",
            "--model.schedule.warmup_epochs=0.3", f"--data.n_train={images}", "--data.n_val=100",
            f"--data.batch_size={batch}",
        ]
    )  # fmt: skip


def bare(images: int, batch: int) -> tuple[float, torch.nn.Module]:
    """Seconds of an epoch in a plain loop, and the network it trained."""
    data = LookupData(n_train=images, n_val=100, batch_size=batch)
    data.setup("fit")
    L.seed_everything(0, verbose=False)
    network = build_network(HOST, GRAFTS, 10, 3, 48)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer(network, OPTIMIZER)
    loader = data.train_dataloader()
    schedule = create_schedule(optimizer, SCHEDULE, 1, len(loader))
    started = time.perf_counter()
    for x, labels in loader:
        x = data.preprocess.normalize(x).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - started, network


def one_epoch_each(images: int, batch: int, bare_first: bool) -> tuple[float, float, float]:
    """Seconds through the command line and bare, and how far apart the weights end."""
    plain = bare(images, batch) if bare_first else None
    with tempfile.TemporaryDirectory() as folder:
        cli = through_the_cli(images, batch, Path(folder) / "run")
    seconds, network = plain or bare(images, batch)
    pairs = zip(cli.model.network.parameters(), network.parameters(), strict=True)
    return cli.clock.seconds[0], seconds, max(float((a - b).detach().abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--repetitions", type=int, default=8)
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    keep_freed_memory()  # as train.py does
    results = {}
    for batch in (64, 4):
        images = arguments.images if batch == 64 else arguments.images // 2
        steps = images // batch
        ms: dict[str, list[float]] = {"cli": [], "bare": []}
        difference = 0.0
        for repetition in range(arguments.repetitions + 1):
            cli_ms, bare_ms, apart = one_epoch_each(images, batch, bare_first=repetition % 2 == 1)
            difference = max(difference, apart)
            if repetition:  # the first one warms up
                ms["cli"].append(1000 * cli_ms / steps)
                ms["bare"].append(1000 * bare_ms / steps)
        pairs = list(zip(ms["cli"], ms["bare"], strict=True))
        results[f"batch {batch}"] = {
            "steps": steps,
            "ms_per_step": {name: summary(values) for name, values in ms.items()},
            "ms_over_bare": summary([a - b for a, b in pairs]),
            "ratio": summary([a / b for a, b in pairs]),
            "largest_weight_difference": difference,
        }
    save("lightning_overhead", results)


if __name__ == "__main__":
    main()
