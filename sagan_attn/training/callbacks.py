"""What training writes into its run folder."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch

from sagan_attn import __version__
from sagan_attn.files import no_formula
from sagan_attn.training.run import FORMAT, RunPaths, write_json, write_text

__all__ = ["RunFolder"]


class RunFolder(L.Callback):
    """Writes config, environment, classes and transform when a fit starts, and predictions.

    A fit that fails in its first epoch leaves nothing of itself.

    Args:
        paths: the run folder.
        config_text: the resolved config, as YAML.
        resumed: whether a fit goes on from a checkpoint; its config and environment stay as they were written.
    """

    def __init__(self, paths: RunPaths, config_text: str, resumed: bool) -> None:
        self.paths = paths
        self.config_text = config_text
        self.resumed = resumed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        print(_summary(pl_module))
        if self.resumed or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        write_text(self.paths.config, self.config_text)
        write_json(self.paths.environment, environment(trainer) | {"data": describe(data)})
        write_json(self.paths.classes, data.classes)
        write_json(self.paths.transform, data.preprocess.to_dict())

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_json(self.paths.finished, {"epochs": trainer.current_epoch, "steps": trainer.global_step})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        unfinished = trainer.state.fn == "fit" and trainer.current_epoch == 0 and not self.resumed
        if unfinished and trainer.is_global_zero and not any(self.paths.checkpoints.glob("*.ckpt")):
            self.paths.remove()

    def write_predictions(self, batches: Sequence[torch.Tensor], classes: Sequence[str], images: Sequence[str]) -> None:
        """predictions.csv: for each image of the test split, in its order, the class and each class's probability."""
        probabilities = torch.cat(list(batches))
        names = [no_formula(name) for name in classes]  # folders' names, which spreadsheets would compute
        table = pd.DataFrame(probabilities.numpy(), columns=names)
        table.insert(0, "prediction", [names[i] for i in probabilities.argmax(dim=1).tolist()], allow_duplicates=True)
        table.insert(0, "image", [no_formula(name) for name in images], allow_duplicates=True)
        table.index.name = "index"
        write_text(self.paths.predictions, table.to_csv())


def _summary(module: Any) -> str:
    """How many parameters are the host's and the grafts', and how many train."""
    own = {id(p): p.numel() for p in module.grafts.parameters()}
    every = {id(p): p.numel() for p in module.network.parameters()}
    train = sum(p.numel() for p in module.network.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in module.resting)
    trained = f"{train - rest:,} until epoch {module.unfreeze_epoch}, {train:,} from then on" if rest else f"{train:,}"
    where = ", ".join(f"{graft.name} at {graft.site}" for graft in module.grafts) or "none"
    host = sum(every.values()) - sum(own.values())
    return f"host {module.host.name}: {host:,} parameters; grafts ({where}): {sum(own.values()):,}; training {trained}"


def describe(data: Any) -> dict[str, Any]:
    """What the data module says of its data, with their fingerprint."""
    return data.describe() | {"fingerprint": data.fingerprint("fit")}


def environment(trainer: L.Trainer) -> dict[str, Any]:
    """Versions, machine, git revision and command of this process, as JSON can hold them."""
    device = trainer.strategy.root_device
    packages = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow", "scikit-learn")
    return {
        "format": FORMAT,
        "sagan_attn": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "git": _git_revision(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git_revision() -> str | None:
    """Revision of the code's checkout, with "+" for uncommitted changes; None where there is none."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]  # not some repository around site-packages
        subprocess.run(tracked, capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")
