"""A trained CIFAR host, its grafts trained alone, saved alone, and loaded onto a fresh copy of the host.

    python benchmarks/grafts_alone.py --root <CIFAR-10 as split/class/file> --label "CIFAR-10 (JPEG copy)"

Trains ResNet-20, freezes it, trains a `sagan` block at layer2 for an epoch, and compares the logits of the whole test
split between the trained model and host + file, bit for bit.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import save
from safetensors.torch import save_file
from timed_cli import TimedCLI
from torch import Tensor, nn

from sagan_attn import freeze_host, graft, grafts_of, load_grafts, save_grafts, summary
from sagan_attn.training import load_run
from sagan_attn.training.allocator import keep_freed_memory
from sagan_attn.training.data import FolderData, augment
from sagan_attn.training.data.preprocess import normalize

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_resnet20.yaml"


def train(model: nn.Module, data: FolderData) -> None:
    """One epoch of AdamW over what is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator()
    for step, (images, labels) in enumerate(data.train_dataloader()):
        normalisation = data.preprocess.mean, data.preprocess.std
        x, _ = augment(images, labels, data.augment, data.num_classes, *normalisation, generator.manual_seed(step))
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def predict(model: nn.Module, data: FolderData) -> tuple[Tensor, float]:
    """Logits of the test split, and their accuracy."""
    mean, std = data.preprocess.mean, data.preprocess.std
    pairs = [(model(normalize(images, mean, std)), labels) for images, labels in data.test_dataloader()]
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return logits, (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--label", required=True, help="name of the copy of the data")
    parser.add_argument("--epochs", type=int, default=3, help="of the host")
    parser.add_argument("--run", help="folder of a trained host; trained first by default")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or f"{folder}/host"
        if arguments.run is None:
            TimedCLI(
                [
                    "fit", "--config", str(CONFIG), "--run_dir", run, "--trainer.max_epochs", str(arguments.epochs),
                    "--model.schedule.warmup_epochs", str(arguments.epochs / 5), "--model.grafts", "[]", "--data",
                    "FolderData", "--data.root", arguments.root, "--data.image_size", "32", "--data.batch_size", "128",
                ]
            )  # fmt: skip
        data = FolderData(arguments.root, image_size=32, batch_size=128)
        data.setup()
        model = load_run(run, "last").model
        host_logits, host_accuracy = predict(model, data)
        example = torch.zeros(1, 3, 32, 32)
        grafts = graft(model, "layer2", block="sagan", example_input=example)
        grafted_logits, _ = predict(model, data)
        freeze_host(model)
        train(model, data)  # in eval mode: the host's batch norms keep what they know
        trained_logits, trained_accuracy = predict(model, data)
        save_grafts(model, f"{folder}/grafts.safetensors")

        fresh = load_run(run, "last").model
        save_file(fresh.state_dict(), f"{folder}/host.safetensors")
        load_grafts(fresh, f"{folder}/grafts.safetensors", example_input=example)
        loaded_logits, _ = predict(fresh, data)
        counts = summary(model)
        save(
            "grafts_alone",
            {
                "data": arguments.label,
                "test_images": len(host_logits),
                "test_accuracy": {"host": host_accuracy, "host and grafts": trained_accuracy},
                "gamma": next(iter(grafts.gammas().values())).item(),
                "bit_identical": {
                    "before training": torch.equal(grafted_logits, host_logits),
                    "after training, switched off": torch.equal(_off(model, data), host_logits),
                    "loaded onto a fresh host": torch.equal(loaded_logits, trained_logits),
                },
                "changed_by_training": not torch.equal(trained_logits, host_logits),
                "parameters": {"host": counts.host_parameters, "grafts": counts.graft_parameters},
                "bytes": {
                    name: Path(path).stat().st_size
                    for name, path in (
                        ("grafts", f"{folder}/grafts.safetensors"),
                        ("host weights", f"{folder}/host.safetensors"),
                        ("host checkpoint", f"{run}/checkpoints/last.ckpt"),
                    )
                },
            },
        )


def _off(model: nn.Module, data: FolderData) -> Tensor:
    with grafts_of(model).disabled():
        return predict(model, data)[0]


if __name__ == "__main__":
    main()
