"""The command line: `python train.py fit|validate|test|predict --config <file>.yaml`, and the default run."""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from sagan_attn.errors import ConfigError, SaganAttnError
from sagan_attn.training.callbacks import RunFolder
from sagan_attn.training.data import ImageData
from sagan_attn.training.hosts import host_preprocess
from sagan_attn.training.logger import EpochCSV
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.run import RunPaths

__all__ = ["SaganCLI", "best_precision", "main"]


class SaganCLI(LightningCLI):
    """LightningCLI with a run folder.

    It differs from Lightning's in these: a checkpoint's hyperparameters are never read, because they can name any
    class to be instantiated and would overrule the command line; `trainer.precision` left out means the best for the
    machine; `run_dir` holds everything a run writes; test and predict take the run's best checkpoint by default.
    """

    folder: RunFolder

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            ClassifierModule,
            ImageData,
            save_config_callback=None,
            seed_everything_default=0,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of the run; fit makes runs/<host>-<time> by default",
        )

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint alone: see the class."""

    @property
    def options(self) -> Any:
        """The parsed config of the subcommand."""
        return self.config[self.config["subcommand"]]

    def before_instantiate_classes(self) -> None:
        options, command = self.options, self.config["subcommand"]
        if options.trainer.precision is None:
            options.trainer.precision = best_precision(str(options.trainer.accelerator))
        checkpoint = options.get("ckpt_path")
        if checkpoint in ("best", "last") and options.run_dir is not None:
            checkpoint = options.ckpt_path = str(RunPaths(options.run_dir).checkpoint(checkpoint))
        if options.run_dir is None and command == "fit" and not checkpoint:
            name = options.model.host.name.replace("/", "-")
            options.run_dir = str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        elif options.run_dir is None and checkpoint:
            options.run_dir = str(Path(checkpoint).parent.parent)
        elif options.run_dir is None:
            raise ConfigError(
                f"{command} needs a run: --run_dir <folder>, or --ckpt_path <folder>/checkpoints/best.ckpt"
            )
        elif command == "fit" and not checkpoint and RunPaths(options.run_dir).config.exists():
            raise ConfigError(
                f"run_dir {options.run_dir} already holds a run: choose another one, or go on with it with "
                f"--ckpt_path {RunPaths(options.run_dir).checkpoint('last')}"
            )
        if command != "fit" and not checkpoint:
            options.ckpt_path = str(RunPaths(options.run_dir).checkpoint("best"))
        if options.get("ckpt_path") and not Path(options.ckpt_path).is_file():
            raise ConfigError(f"there is no checkpoint {options.ckpt_path}")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.datamodule: ImageData
        preprocess = host_preprocess(self.model.host)
        if preprocess is not None:
            self.datamodule.use_preprocess(preprocess)
        options = self.options
        paths = RunPaths(options.run_dir)
        saved = options.clone()
        for argument in ("ckpt_path", "weights_only", "verbose", "return_predictions"):  # of this call, not of the run
            saved.pop(argument, None)
        config_text = self._parser(self.subcommand).dump(saved, skip_validation=True, format="yaml")
        self.folder = RunFolder(paths, config_text)
        trainer = self.config_init[self.config["subcommand"]].trainer
        callbacks = [*self._listed(trainer.callbacks), self.folder]
        if trainer.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # it does not know attention's FLOPs; ours says host and grafts
        if trainer.enable_checkpointing is not False:
            callbacks.append(_checkpoints(paths, self.datamodule))
        if trainer.enable_progress_bar is not False and not _has(callbacks, "ProgressBar"):
            callbacks.append(RichProgressBar(leave=True))
        logger = trainer.logger
        if logger in (None, True):
            logger = [EpochCSV(paths.metrics), TensorBoardLogger(paths.folder, name="tensorboard", version="")]
            if self.subcommand != "fit":
                logger = False
        return super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)

    @staticmethod
    def _listed(callbacks: Any) -> list[Any]:
        if callbacks is None:
            return []
        return list(callbacks) if isinstance(callbacks, list) else [callbacks]

    def fit(self, **arguments: Any) -> None:
        """`Trainer.fit`, then say where things are."""
        started = time.perf_counter()
        self.trainer.fit(**arguments)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            metrics = self.trainer.callback_metrics
            accuracy = f", validation accuracy {metrics['val/accuracy']:.4f}" if "val/accuracy" in metrics else ""
            print(f"{time.perf_counter() - started:.0f} s{accuracy}; run folder: {self.folder.paths.folder}")

    def test(self, **arguments: Any) -> None:
        """`Trainer.test`, then say where things are."""
        self.trainer.test(**arguments)
        print(f"test metrics and logits: {self.folder.paths.test_metrics}, {self.folder.paths.test_logits}")

    def predict(self, **arguments: Any) -> None:
        """`Trainer.predict` on the test split, written to predictions.csv."""
        batches = self.trainer.predict(**{**arguments, "return_predictions": True})
        self.folder.write_predictions(batches, self.datamodule.classes)  # type: ignore[arg-type]
        print(f"predictions: {self.folder.paths.predictions}")


def best_precision(accelerator: str) -> str:
    """The fastest precision that trains well: bfloat16 where the hardware multiplies it, float16 on older GPUs.

    A CPU without bfloat16 instructions emulates them, about ten times slower than float32.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "cpu") and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16-mixed"
    return "32-true"


def _checkpoints(paths: RunPaths, data: ImageData) -> ModelCheckpoint:
    """best.ckpt by validation accuracy, and last.ckpt; without validation images both are the last epoch's."""
    monitor = {"monitor": "val/accuracy", "mode": "max"} if data.val_fraction else {}
    return ModelCheckpoint(
        dirpath=paths.checkpoints,
        filename="best",
        save_last=True,
        enable_version_counter=False,
        **monitor,  # type: ignore[arg-type]
    )


def _quieten() -> None:
    """Keep advertisements and notes on Lightning's own inside from the terminal."""
    for message in (
        ".*treespec, LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*many workers.*",
        "Checkpoint directory .* not empty",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())


def _has(callbacks: list[Any], kind: str) -> bool:
    return any(kind in {base.__name__ for base in type(callback).__mro__} for callback in callbacks)


def main(arguments: Sequence[str] | None = None, *, default_config: Path | None = None) -> int:
    """Run the command line; without arguments, the default run on `default_config`. Returns the exit code.

    What the library refuses is printed as one line; a wrong option ends the process with code 2.
    """
    _quieten()
    try:
        if not (sys.argv[1:] if arguments is None else arguments) and default_config is not None:
            from sagan_attn.training.demo import default_run

            default_run(default_config)
        else:
            SaganCLI(arguments)
    except SaganAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
