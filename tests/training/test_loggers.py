"""Loggers beside metrics.csv: where they write, what else a run does with them, and what a config of one may say."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from jsonargparse import Namespace
from lightning_utilities.core.imports import RequirementCache
from small_runs import SMALL

from sagan_attn.errors import ConfigError
from sagan_attn.training.class_paths import check_config
from sagan_attn.training.cli import main
from sagan_attn.training.logger import place_loggers
from sagan_attn.training.run import RunPaths

ROOT = Path(__file__).parents[2]
LOGGERS = "lightning.pytorch.loggers"
ONE_EPOCH = [*SMALL, "--trainer.max_epochs=1", "--model.schedule.warmup_epochs=0", "--data.n_train=64"]


def train(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python train.py` in a folder, without network."""
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}, **environment},
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_metrics_csv_stays_beside_a_logger_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, own = tmp_path / "run", tmp_path / "own"
    logger = ["--trainer.logger", "CSVLogger", f"--trainer.logger.save_dir={own}"]
    assert main(["fit", *ONE_EPOCH, *logger, "--run_dir", str(run)]) == 0
    (theirs,) = own.rglob("metrics.csv")
    (accuracy,) = pd.read_csv(run / "metrics.csv")["val/accuracy"]
    assert pd.read_csv(theirs)["val/accuracy"].dropna().tolist() == [accuracy]
    assert "tensorboard" not in names_in(run)
    files = {path for path in own.rglob("*")}
    for command in ("test", "validate"):  # which log nothing: their results are files of the run
        assert main([command, "--config", str(run / "config.yaml")]) == 0
    assert {path for path in own.rglob("*")} == files
    assert "test_metrics.json" in names_in(run)
    capsys.readouterr()
    assert main(["fit", "--config", str(run / "config.yaml"), "--resume", "auto"]) == 1
    assert "trainer.logger.init_args.save_dir is" in capsys.readouterr().err
    assert main(["fit", *ONE_EPOCH, *logger, "--run_dir", str(run), "--resume", "auto"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_no_logger(tmp_path: Path):
    assert main(["fit", *ONE_EPOCH, "--trainer.logger=false", "--run_dir", str(tmp_path / "run")]) == 0
    assert not names_in(tmp_path / "run") & {"metrics.csv", "tensorboard"}


@pytest.mark.parametrize("name", ["wandb", pytest.param("mlflow", marks=pytest.mark.slow)])
def test_a_logger_that_is_not_installed(name: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(f"{LOGGERS}.{name}._{name.upper()}_AVAILABLE", RequirementCache(f"{name}>=999"))
    logger = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]
    assert main(["fit", *ONE_EPOCH, "--trainer.logger", logger, "--run_dir", str(tmp_path / "run")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert line.startswith(f"error: trainer: Problem with given class_path '{LOGGERS}.{logger}': Requirement '{name}")
    assert not (tmp_path / "run").exists()


def logger_config(name: str, **arguments: Any) -> Namespace:
    return Namespace(class_path=f"{LOGGERS}.{name}", init_args=Namespace(**arguments))


def test_where_loggers_write():
    paths = RunPaths("/runs/mine")
    wandb = logger_config("WandbLogger", save_dir=".")
    mlflow = logger_config("MLFlowLogger", save_dir="./mlruns", tracking_uri=None, artifact_location=None)
    said = [
        logger_config("WandbLogger", save_dir="elsewhere"),
        logger_config("MLFlowLogger", save_dir="./mlruns", tracking_uri="http://host", artifact_location=None),
        logger_config("CSVLogger", save_dir="."),
    ]
    before = [config.clone() for config in said]
    place_loggers([wandb, mlflow, *said], paths)
    assert wandb.init_args.save_dir == "/runs/mine"
    assert mlflow.init_args.tracking_uri == "sqlite:////runs/mine/mlflow.db"
    assert mlflow.init_args.artifact_location == "/runs/mine/mlruns"
    assert said == before
    alone = logger_config("WandbLogger", save_dir=".")
    for configs in (alone, None, True, False):
        place_loggers(configs, paths)
    assert alone.init_args.save_dir == "/runs/mine"


def run_config(name: str, further: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    logger = {"class_path": f"{LOGGERS}.{name}", "init_args": arguments}
    return {
        "trainer": {"logger": [logger | ({} if further is None else {"dict_kwargs": further})]},
        "data": {"class_path": "sagan_attn.training.data.LookupData"},
    }


@pytest.mark.parametrize(
    ("config", "named", "in_tests_too"),
    [
        (run_config("MLFlowLogger", tracking_uri="http://host"), "tracking_uri", False),
        (run_config("MLFlowLogger", tracking_uri=None, artifact_location="s3://x"), "artifact_location", False),
        (run_config("MLFlowLogger", save_dir="/home"), "save_dir", False),
        (run_config("WandbLogger", save_dir="/home"), "save_dir", False),
        (run_config("WandbLogger", dir="/home"), "dir", False),
        (run_config("CSVLogger", save_dir="/home"), "save_dir", False),
        (run_config("WandbLogger", experiment="os.system"), "experiment", True),
        (run_config("WandbLogger", {"settings": {"base_url": "http://host"}}), "dict_kwargs.settings", True),
        (run_config("MLFlowLogger", {"entity": "team"}), "dict_kwargs", True),
        (run_config("WandbLogger", {"notes": "{class_path: os.system}"}), "dict_kwargs.notes", True),
        (run_config("CometLogger"), "class_path", True),
    ],
)
def test_what_travels_does_not_say_where_loggers_write(config: dict[str, Any], named: str, in_tests_too: bool):
    with pytest.raises(ConfigError, match=named):
        check_config(config, "a config")
    if in_tests_too:
        with pytest.raises(ConfigError, match=named):
            check_config(config, "a config", fitting=False)
    else:
        check_config(config, "a config", fitting=False)  # logs nothing, so it is all the same


def test_what_travels_may_name_a_logger(monkeypatch: pytest.MonkeyPatch):
    for config in (
        run_config("WandbLogger", {"entity": "team", "tags": ["a"]}, save_dir=".", project="p", offline=True, id=None),
        run_config("MLFlowLogger", save_dir="./mlruns", tracking_uri=None, experiment_name="e", log_model=False),
    ):
        check_config(config, "a config")
    config = run_config("MLFlowLogger", tracking_uri="http://host")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")  # where it would go without a config, too
    check_config(config, "a config")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own of SQLAlchemy, when its database is read
@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_in_one_line_and_offline(name: str, tmp_path: Path):
    """Trains, tests and goes on from the run's own config; everything is in the run folder, and metrics.csv too."""
    for module in {"WandbLogger": ["wandb"], "MLFlowLogger": ["mlflow", "sqlalchemy"]}[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    run = tmp_path / "run"
    options = ["--trainer.logger.offline", "true"] if name == "WandbLogger" else []
    fit = train("fit", *ONE_EPOCH, "--trainer.logger", name, *options, "--run_dir", str(run), folder=tmp_path)
    assert fit.returncode == 0, fit.stderr
    assert names_in(tmp_path) == {"run"}
    (row,) = pd.read_csv(run / "metrics.csv").to_dict("records")
    logged = set(row) - {"epoch", "step"}
    assert logged >= {"train/loss", "val/accuracy", "gamma/local.act.grafts.sagan"}
    if name == "WandbLogger":
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        content = file.read_bytes()
        assert not [key for key in logged if key.encode() not in content]
    else:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "lightning_logs"]
        (record,) = client.search_runs([experiment.experiment_id])
        assert record.data.metrics["val/accuracy"] == pytest.approx(row["val/accuracy"])
        assert logged <= set(record.data.metrics)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert str(tmp_path) not in yaml.safe_dump(config["trainer"])  # so that the folder can be moved
    before = {path for path in run.rglob("*") if path.name not in ("test", "test_metrics.json")}
    test = train("test", "--config", str(run / "config.yaml"), folder=tmp_path)
    assert test.returncode == 0, test.stderr
    new = {path.relative_to(run).parts[0] for path in {*run.rglob("*")} - before}
    assert new <= {"test", "test_metrics.json", "test_logits.safetensors"}
    again = train("fit", "--config", str(run / "config.yaml"), "--resume", "auto", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "is complete" in again.stdout
    assert names_in(tmp_path) == {"run"}


@pytest.mark.slow
def test_a_fit_that_fails_at_once_leaves_nothing_of_wandb(tmp_path: Path):
    pytest.importorskip("wandb")
    arguments = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true", "--model.optimizer.lr=1e30"]
    fit = train("fit", *ONE_EPOCH, *arguments, "--run_dir", str(tmp_path / "run"), folder=tmp_path)
    assert fit.returncode == 1
    assert "error: " in fit.stderr
    assert not names_in(tmp_path)
