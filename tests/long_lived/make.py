"""Files as this version of the library writes them, for every later version to read.

    python tests/long_lived/make.py <folder>

Made once for each version that changes a format, then moved to tests/long_lived/v<format> and never changed:
`test_long_lived.py` reads them. Runs keep the path of their folder, so make them in one with a plain name.

base.yaml         the config they were made with
run/              a training run that SIGTERM stopped in its second epoch, with its test
ablation/         a screen and a confirmation, without the report; spec.yaml beside it
hub/              grafts of every form, of a host of ours, as for the Hub
expected.json     what they give
"""

import json
import os
import platform
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sagan_attn import HubGrafts, graft, grafts_of
from sagan_attn.__main__ import main as command
from sagan_attn.ablation.store import read_results
from sagan_attn.surgery import Grafts
from sagan_attn.training.cli import main as train
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.run import load_run

CONFIG = Path(__file__).parents[2] / "configs" / "lookup.yaml"
FEW = {"n_train": 64, "n_val": 64, "n_test": 64, "batch_size": 16}
STEPS = FEW["n_train"] // FEW["batch_size"]  # of an epoch
SPEC = {
    "base": "base.yaml",
    "set": {"model.host.options": {"width": 4}, **{f"data.init_args.{key}": value for key, value in FEW.items()}},
    "axes": {"block": ["sagan", "nonlocal"]},
    "controls": ["none"],
    "screen": {"seeds": 1, "epochs": [1]},
    "confirm": {"seeds": 6, "epochs": [1], "choose": 1},
}
# Every registered form that needs nothing but a map
FORMS = (
    *("sagan", "sagan-paper", "biggan", "fastai", "botnet", "nonlocal", "nonlocal-caffe2", "nonlocal-alexhex7"),
    *("nonlocal-mmcv", "nonlocal-timm", "multihead", "additive", "encoder", "context-max", "context-mean", "identity"),
    *("conv", "se", "gc"),
)


def run_arguments(folder: Path) -> list[str]:
    """The call of the run in a folder of these files."""
    return [
        *["fit", f"--config={folder / 'base.yaml'}", f"--run_dir={folder / 'run'}", "--resume=auto"],
        *["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"],
        *['--model.host.options={"width": 8}', "--model.schedule.warmup_epochs=1"],
        *(f"--data.{key}={value}" for key, value in FEW.items()),
    ]


def test_arguments(folder: Path) -> list[str]:
    """The call that tests the run."""
    quiet = "--trainer.enable_progress_bar=false"
    return ["test", f"--config={folder / 'run' / 'config.yaml'}", f"--run_dir={folder / 'run'}", quiet]


def images(size: int) -> Tensor:
    """Two images [2, 3, S, S], the same on every machine."""
    values = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return torch.sin(values * 0.37).float().reshape(2, 3, size, size)


def host() -> nn.Module:
    """A host whose weights are the same on every machine."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    _fill(model, 0.1)
    return model.eval()


def grafted_host() -> nn.Module:
    """The host with every form in it, all of them away from the identity."""
    model = host()
    for name in FORMS:
        graft(model, "2", block=name, name=f"form_{name.replace('-', '_')}", example_input=images(24))
    graft(model, "0", block="sagan", options={"gamma_init": 1.0}, gate=True, example_input=images(24))
    _fill(grafts_of(model), 0.2)
    return model


def stopped_run(folder: Path) -> None:
    """A run that SIGTERM stopped in its second epoch."""
    step, seen = ClassifierModule.training_step, []

    def training_step(module: ClassifierModule, batch: Any, batch_idx: int) -> Tensor:
        seen.append(batch_idx)
        if len(seen) == STEPS + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    ClassifierModule.training_step = training_step  # type: ignore[method-assign]
    try:
        _check(train(run_arguments(folder)), 143)
    finally:
        ClassifierModule.training_step = step  # type: ignore[method-assign]


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    sys.argv = ["train.py"]  # which runs keep, and Lightning warns of what else it finds there
    shutil.copy(CONFIG, folder / "base.yaml")
    stopped_run(folder)
    _check(train(test_arguments(folder)), 0)
    model = grafted_host()
    HubGrafts(model).save_pretrained(folder / "hub")
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    _check(command(["ablate", str(folder / "spec.yaml"), "--folder", str(folder / "ablation"), "--threads", "1"]), 0)
    results, _, _ = read_results(folder / "ablation")
    with torch.no_grad():
        expected = {
            "run": {name: load_run(folder / "run", name).model(images(48)).tolist() for name in ("best", "last")},
            "test": json.loads((folder / "run" / "test_metrics.json").read_text()),
            "grafts": model(images(24)).tolist(),
            "accuracies": {result["key"]: result["metrics"]["val/accuracy"] for result in results},
        }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for name in ("ablation/report", "run/tensorboard"):  # which nobody reads back, as pictures
        shutil.rmtree(folder / name)
    for path in [*folder.rglob("*lock"), *folder.rglob("*.png")]:
        path.unlink()
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace(platform.platform(), platform.system()))


def _fill(model: nn.Module | Grafts, size: float) -> None:
    """Set the parameters to numbers that need no generator."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64) + 7 * index
            parameter.copy_((size * torch.sin(values)).reshape(parameter.shape))


def _check(code: int, required: int) -> None:
    if code != required:
        raise SystemExit(f"ended with {code} instead of {required}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
