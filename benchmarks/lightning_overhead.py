"""Lightning's own cost: an epoch of `train.py fit` against a bare PyTorch loop that does the same steps.

    python benchmarks/lightning_overhead.py

The same network, data, augmentation, optimizer and schedule; the epochs of the two are timed in turn, without
validation. Both start from the same seed, and the losses of their last steps are compared to show it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from machine import save, summary
from timed_cli import TimedCLI

from sagan_attn.training.allocator import keep_freed_memory
from sagan_attn.training.data import LookupData
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.network import build_network
from sagan_attn.training.optim import create_optimizer, create_schedule


def through_the_cli(images: int, batch: int, folder: Path) -> TimedCLI:
    config = Path(__file__).parents[1] / "configs" / "lookup.yaml"
    return TimedCLI(
        [
            "fit", "--config", str(config), "--run_dir", str(folder), "--trainer.max_epochs=1",
            "--trainer.limit_val_batches=0", "--trainer.precision=32-true", "--trainer.accelerator=cpu",
            "--model.schedule.warmup_epochs=0.3", f"--data.n_train={images}", "--data.n_val=100",
            f"--data.batch_size={batch}",
        ]
    )  # fmt: skip


def bare(images: int, batch: int, module: ClassifierModule) -> tuple[float, torch.nn.Module]:
    data = LookupData(n_train=images, n_val=100, batch_size=batch)
    data.setup("fit")
    L.seed_everything(0, verbose=False)
    network = build_network(module.host, module.graft_configs, 10, 3, 48)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer(network, module.optimizer_config)
    loader = data.train_dataloader()
    schedule = create_schedule(optimizer, module.schedule_config, 1, len(loader))
    started = time.perf_counter()
    for x, labels in loader:
        x = data.preprocess.normalize(x).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - started, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    keep_freed_memory()  # as train.py does
    results = {}
    for batch in (64, 8):
        images = arguments.images if batch == 64 else arguments.images // 4
        seconds: dict[str, list[float]] = {"cli": [], "bare": []}
        difference = 0.0
        for repetition in range(arguments.repetitions + 1):
            with tempfile.TemporaryDirectory() as folder:
                cli = through_the_cli(images, batch, Path(folder) / "run")
            plain, other = bare(images, batch, cli.model)
            pairs = zip(cli.model.network.parameters(), other.parameters(), strict=True)
            difference = max(difference, max(float((a - b).detach().abs().max()) for a, b in pairs))
            if repetition:  # the first one warms up
                seconds["cli"].append(cli.clock.seconds[0])
                seconds["bare"].append(plain)
        steps = images // batch
        results[f"batch {batch}"] = {
            "steps": steps,
            "ms_per_step": {name: summary([1000 * s / steps for s in values]) for name, values in seconds.items()},
            "ratio": summary([a / b for a, b in zip(seconds["cli"], seconds["bare"], strict=True)]),
            "largest_weight_difference": difference,
        }
    save("lightning_overhead", results)


if __name__ == "__main__":
    main()
