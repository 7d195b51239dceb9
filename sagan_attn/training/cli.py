"""The command line: `python train.py fit|validate|test|predict --config <file>.yaml`, and the default run."""

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from jsonargparse.typing import PositiveFloat
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sagan_attn.errors import ConfigError, SaganAttnError, one_line
from sagan_attn.training.allocator import keep_freed_memory
from sagan_attn.training.callbacks import RunFolder
from sagan_attn.training.checkpoints import (
    WholeFileIO,
    check_averaging,
    check_resume,
    checkpoint_callbacks,
    newest_checkpoint,
)
from sagan_attn.training.data import ImageData
from sagan_attn.training.finite import FiniteGuard
from sagan_attn.training.hosts import host_preprocess
from sagan_attn.training.logger import EpochCSV, EpochRow, full_disk_of, place_loggers
from sagan_attn.training.memory import OutOfMemoryNote, is_out_of_memory, out_of_memory_words
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.parser import ConfigParser, null_is_a_value
from sagan_attn.training.profiler import NoProfiler
from sagan_attn.training.progress import SecondBar
from sagan_attn.training.quiet import quieten
from sagan_attn.training.random_state import RandomState
from sagan_attn.training.run import RunPaths, read_checkpoint
from sagan_attn.training.stopping import KeepGoing, StoppedBySignalError
from sagan_attn.training.test_results import ReportTest, covers_all

__all__ = ["SaganCLI", "best_precision", "main"]


# What of a call belongs to the run, and is kept in its config.yaml.
KEPT = ("seed_everything", "trainer", "model", "data", "run_dir")


class SaganCLI(LightningCLI):
    """LightningCLI with a run folder.

    It differs from Lightning's in these: a checkpoint's hyperparameters are never read, because they can name any
    class to be instantiated and would overrule the command line; `trainer.precision` left out means the best for the
    machine; `run_dir` holds everything a run writes; test and predict take the run's best checkpoint by default.
    """

    folder: RunFolder
    complete = False  # the run that was to go on
    config_text: str  # of the run folder

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self._words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        command = self._words[0] if self._words else None
        self._called = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == command}
        super().__init__(
            ClassifierModule,
            ImageData,
            save_config_callback=None,
            seed_everything_default=0,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=ConfigParser,
            args=list(args) if args is not None else None,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of the run; fit makes runs/<host>-<time> by default",
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: go on with the run in run_dir from its newest whole checkpoint, or begin it",
        )
        parser.add_argument(
            "--checkpoint_minutes", type=PositiveFloat, default=10.0, help="time between checkpoints in mid-epoch"
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is called: making the parsers of the others takes most of a call's first second."""
        return self._called or LightningCLI.subcommands()

    def setup_parser(self, *arguments: Any, **options: Any) -> None:
        with null_is_a_value():
            super().setup_parser(*arguments, **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's, without its warning about calls from Python, which here are ablations and demonstrations."""
        with null_is_a_value():
            self.config = parser.parse_args(args)
        if self.options.trainer is None:
            raise ConfigError("trainer (None) must be a mapping of its arguments, which may be empty: {}")
        if self.options.data is None:
            raise ConfigError("data is required: --data LookupData, or data in a config, with class_path and init_args")

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint alone: see the class."""

    @property
    def options(self) -> Any:
        """The parsed config of the subcommand."""
        return self.config[self.config["subcommand"]]

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        """Settle run folder, checkpoint and precision, before anything is built."""
        options, command = self.options, self.config["subcommand"]
        if options.trainer.precision is None:
            options.trainer.precision = best_precision(str(options.trainer.accelerator))
        options.weights_only = True  # checkpoints hold no code
        paths = RunPaths(self._run_dir())
        options.run_dir = str(paths.folder)
        if checkpoint := self._newest(paths) if options.resume else self._given(paths):
            options.ckpt_path = str(checkpoint)
            content = read_checkpoint(checkpoint)
            if paths.config.is_file() and checkpoint.resolve().parent != paths.checkpoints:
                raise ConfigError(
                    f"checkpoint {checkpoint} is not of the run in {paths.folder}: choose another run_dir"
                )
            if command == "fit":
                check_resume(self._saved_config(), paths)
                check_averaging(self._saved_config(), content)
        if command in ("test", "predict") and options.trainer.devices not in (1, "1"):
            options.trainer.devices, options.trainer.strategy = 1, "auto"  # several would see some images twice
        self.config_text = yaml.safe_dump(self._saved_config(), sort_keys=False)
        if command == "fit":
            place_loggers(options.trainer.logger, paths)
        else:
            options.trainer.logger = False  # the results are files of the run folder

    def _given(self, paths: RunPaths) -> Path | None:
        """The checkpoint that was asked for, or the one that is taken for anything but a fit."""
        options, command = self.options, self.config["subcommand"]
        checkpoint = options.get("ckpt_path")
        if checkpoint in ("best", "last"):
            return paths.checkpoint(checkpoint)
        if command != "fit" and not checkpoint:
            if not paths.checkpoint("best").is_file() and paths.checkpoint("last").is_file():
                print(f"{paths.folder} was not validated and has no best checkpoint: taking the last one")
                return paths.checkpoint("last")
            return paths.checkpoint("best")
        if not checkpoint and paths.folder.exists() and any(paths.folder.iterdir()):
            raise ConfigError(
                f"run_dir {paths.folder} already holds a run or other files: choose another one, or go on with its run "
                "with --resume auto"
            )
        return Path(checkpoint) if checkpoint else None

    def _newest(self, paths: RunPaths) -> Path | None:
        """The checkpoint that the run in a folder goes on from; None where there is nothing to go on from yet."""
        if self.config["subcommand"] != "fit" or self.options.get("ckpt_path"):
            raise ConfigError("--resume auto finds the checkpoint of a fit by itself: leave one of the two out")
        if not paths.config.is_file() and (foreign := paths.foreign()):  # beside a run there may be what was made of it
            raise ConfigError(
                f"run_dir {paths.folder} holds files that are not of a run ({', '.join(foreign[:3])}): choose another"
            )
        if paths.config.is_file():
            check_resume(self._saved_config(), paths)
        self.complete = paths.finished.is_file()
        return newest_checkpoint(paths)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a data module says in an account of the types it tried
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SaganAttnError):
                cause = cause.__cause__ or cause.__context__
            raise cause or _refusal(error) from None

    def _run_dir(self) -> Path:
        """The run folder: as given, or that of the checkpoint, or for a fit a new one."""
        options, checkpoint = self.options, self.options.get("ckpt_path")
        if options.resume and not options.run_dir:
            raise ConfigError("--resume auto needs --run_dir <folder>, whose run goes on")
        if options.run_dir:
            folder = self._folder_of_config() or Path(options.run_dir)
        elif checkpoint and Path(checkpoint).resolve().parent.name == "checkpoints":
            folder = Path(checkpoint).resolve().parent.parent
        elif self.config["subcommand"] == "fit" and not checkpoint:
            name = re.sub(r"[^\w.-]", "-", options.model.host.name)
            folder = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        else:
            raise ConfigError(
                f"{self.config['subcommand']} needs a run: --run_dir <folder>, or --ckpt_path "
                "<folder>/checkpoints/best.ckpt"
            )
        folder = folder.resolve()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"run_dir {folder} cannot be written: {existing} is no folder or not writable")
        return folder

    def _folder_of_config(self) -> Path | None:
        """Where the run lies whose config is the one of this call; it may have been moved or copied."""
        if any(word.partition("=")[0] == "--run_dir" for word in self._words):
            return None
        for path in [Path(str(config)).absolute() for config in self.options.get("config") or [] if config]:
            if path == RunPaths(path.parent).config and RunPaths(path.parent).checkpoints.is_dir():
                return path.parent
        return None

    def _saved_config(self) -> dict[str, Any]:
        """The config as it is kept in the run folder: without what concerns this call alone."""
        saved = self.options.clone()
        for argument in {key.partition(".")[0] for key in saved.keys()} - {*KEPT}:  # noqa: SIM118  (no dict)
            saved.pop(argument)
        parser = self._parser(self.config["subcommand"])
        config, defaults = yaml.safe_load(parser.dump(saved, skip_validation=True)), parser.get_defaults()
        for key in saved.keys():  # noqa: SIM118  (no dict)
            if saved[key] is None and defaults.get(key) is not None:  # which `dump` leaves out
                section, _, name = key.rpartition(".")
                reduce(getitem, section.split("."), config)[name] = None
        return config

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.datamodule: ImageData
        preprocess = host_preprocess(self.model.host)
        if preprocess is not None:
            self.datamodule.use_preprocess(preprocess)
        fitting = self.config["subcommand"] == "fit"
        paths = RunPaths(self.options.run_dir)
        self.folder = RunFolder(paths, self.config_text, resumed=bool(self.options.get("ckpt_path")))
        trainer = self.config_init[self.config["subcommand"]].trainer
        callbacks = [*_listed(trainer.callbacks), self.folder, ReportTest(paths), OutOfMemoryNote()]
        if not any(isinstance(callback, FiniteGuard) for callback in callbacks):
            callbacks.append(FiniteGuard())
        if trainer.enable_checkpointing is not False and not trainer.fast_dev_run:
            callbacks += [RandomState(), EpochRow(), *checkpoint_callbacks(paths)]
            if fitting:
                callbacks.append(KeepGoing(paths, self.options.checkpoint_minutes))
            kwargs["plugins"] = [*_listed(trainer.plugins), WholeFileIO()]
        if trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(SecondBar())
        if trainer.profiler is None:
            kwargs["profiler"] = NoProfiler()
        if trainer.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # it does not know attention's FLOPs; ours says host and grafts
        if trainer.logger is not False:
            given = _listed(trainer.logger) if trainer.logger is not True else []
            board = TensorBoardLogger(paths.folder, name="tensorboard", version="")
            kwargs["logger"] = [EpochCSV(paths.metrics), *(given or [board])]
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"trainer: {error}") from error

    def fit(self, **arguments: Any) -> None:
        """`Trainer.fit`, then say where things are."""
        if self.complete:
            print(f"the run in {self.folder.paths.folder} is complete")
            return
        started = time.perf_counter()
        with full_disk_of(self.folder.paths.folder):
            self.trainer.fit(**arguments)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            metrics = self.trainer.callback_metrics
            accuracy = f", validation accuracy {metrics['val/accuracy']:.4f}" if "val/accuracy" in metrics else ""
            print(f"{time.perf_counter() - started:.0f} s{accuracy}; run folder: {self.folder.paths.folder}")

    def predict(self, **arguments: Any) -> None:
        """`Trainer.predict` on the test split, written to predictions.csv."""
        batches = self.trainer.predict(**{**arguments, "return_predictions": True}) or []
        if covers_all(self.trainer, images := sum(len(batch) for batch in batches)):  # type: ignore[arg-type]
            pictures = self.datamodule.given_pictures("test")
            names = [pictures.name(index) for index in range(images)]
            self.folder.write_predictions(batches, self.datamodule.classes, names)  # type: ignore[arg-type]
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


def _listed(value: Any) -> list[Any]:
    """A config's callbacks or plugins: none, one or a list of them."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _refusal(error: ValueError) -> ValueError:
    """What a class of the config said when it was built, in jsonargparse's account of the types it tried."""
    reason = str(error).partition("\nErrors:\n  - ")[2].partition("\n  - ")[0]
    return ConfigError(f"trainer: {' '.join(reason.split())}") if reason else error


def _message(error: Exception) -> str:
    """The error on one line; of one raised in a loader's worker, what the worker said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def main(arguments: Sequence[str] | None = None, *, default_config: Path | None = None) -> int:
    """Run the command line; without arguments, the default run on `default_config`. Returns the exit code.

    What the library refuses is printed as one line; a wrong option ends the process with code 2.
    """
    quieten()
    keep_freed_memory()
    try:
        if not (sys.argv[1:] if arguments is None else arguments) and default_config is not None:
            from sagan_attn.training.demo import default_run

            default_run(default_config)
        else:
            SaganCLI(arguments)
    except StoppedBySignalError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except SIGTERMException:  # a SystemExit without a code, with which the process would end as if it had finished
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # for which Lightning ends the process with 1
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        raise
    except (SaganAttnError, MisconfigurationException, OSError) as error:  # OSError: a full disk, no permission
        print(f"error: {one_line(_message(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {out_of_memory_words(error)}", file=sys.stderr)
        return 1
    return 0
