"""Test accuracy and seconds an epoch of a CIFAR host alone and with its grafts: same seeds, data and budget.

    python benchmarks/cifar10.py --root <CIFAR-10 as split/class/file> --label "CIFAR-10 (JPEG copy)" --epochs 4
    python benchmarks/cifar10.py --config configs/cifar10_resnet18.yaml --epochs 30 --name cifar10_resnet18  # a GPU

The last epoch's weights are tested, once, so nothing is chosen on any split. Without --root the original files are
downloaded.
"""

import argparse
import sys
from pathlib import Path

from machine import save
from timed_cli import TimedCLI

from sagan_attn.training.allocator import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parents[1] / "configs" / "cifar10_resnet20.yaml"))
    parser.add_argument("--root", help="folder of images; the original files by default")
    parser.add_argument("--label", default="CIFAR-10 (original files)", help="name of the copy of the data")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="runs/cifar10", help="folder of the runs")
    parser.add_argument("--name", default="cifar10_resnet20", help="name of the JSON file")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    keep_freed_memory()  # as train.py does
    rows = []
    for seed in arguments.seeds:
        for variant in ("host", "grafted"):
            options = [
                "fit", "--config", arguments.config, "--run_dir", f"{arguments.out}/{variant}-{seed}",
                "--seed_everything", str(seed), "--trainer.max_epochs", str(arguments.epochs),
                "--model.schedule.warmup_epochs", str(arguments.epochs / 5),
            ]  # fmt: skip
            if arguments.root:
                options += ["--data", "FolderData", "--data.root", arguments.root, "--data.image_size", "32"]
                options += ["--data.batch_size", "128"]
            options += ["--data.seed", str(seed)]
            if variant == "host":
                options += ["--model.grafts", "[]"]
            cli = TimedCLI(options)
            validation = cli.trainer.callback_metrics.get("val/accuracy")
            (metrics,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            rows.append(
                {
                    "variant": variant,
                    "grafts": [graft.path for graft in cli.model.grafts],
                    "seed": seed,
                    "test_accuracy": metrics["test/accuracy"],
                    "test_loss": metrics["test/loss"],
                    "validation_accuracy": None if validation is None else float(validation),
                    "parameters": sum(p.numel() for p in cli.model.network.parameters()),
                    "gamma": {name: gamma.item() for name, gamma in cli.model.grafts.gammas().items()},
                    "seconds_an_epoch": cli.clock.seconds,
                    "precision": str(cli.trainer.precision),
                }
            )
    save(
        arguments.name,
        {"data": arguments.label, "config": Path(arguments.config).name, "epochs": arguments.epochs, "rows": rows},
    )


if __name__ == "__main__":
    main()
