"""The callback: figures and sheets over training, and a training that is not changed by them."""

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from small_runs import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sagan_attn.errors import CheckpointError, ConfigError
from sagan_attn.training.attention_log import FIGURES, AttentionLog
from sagan_attn.training.cli import main
from sagan_attn.training.run import RunPaths, read_checkpoint
from sagan_attn.viz.curves import training_curves

PATH = "local.act.grafts.sagan"


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Folder of a `fit` as `small_run`, with the callback in the config."""
    folder = tmp_path_factory.mktemp("logged")
    config = {"class_path": "sagan_attn.training.attention_log.AttentionLog", "init_args": {"images": 2}}
    (folder / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [config]}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py"])
        assert main(["fit", *SMALL, "--config", str(folder / "callback.yaml"), "--run_dir", str(folder / "run")]) == 0
    return RunPaths(folder / "run")


def test_training_is_the_same_to_the_bit(logged, small_run):
    ours, theirs = (read_checkpoint(paths.checkpoint("last")) for paths in (logged, RunPaths(small_run)))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in ours["state_dict"].items():
        assert torch.equal(tensor, theirs["state_dict"][name]), name


def test_figures_and_sheets_are_logged(logged):
    table = pd.read_csv(logged.metrics)
    for name in FIGURES[:-1]:  # one head agrees with no other
        column = table[f"attention/{name}/{PATH}/head0"]
        assert column.notna().tolist() == [True, True]
    assert not any(column.startswith("attention/agreement") for column in table)
    assert (table[f"attention/entropy_share/{PATH}/head0"] <= 1).all()
    events = EventAccumulator(str(logged.tensorboard))
    events.Reload()
    assert f"attention/distance/{PATH}/head0" in events.Tags()["scalars"]
    images = events.Images(f"attention/{PATH}")
    assert len(images) == 2
    assert images[0].width > 300


def test_curves_over_training(logged, tmp_path):
    figure = training_curves(logged.metrics)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["distance", "entropy share", "query independence", "self weight", "gamma"]
    gamma = pd.read_csv(logged.metrics)[f"gamma/{PATH}"]
    (line,) = figure.axes[4].lines
    assert line.get_ydata() == pytest.approx(gamma)
    assert list(line.get_xdata()) == [1, 2]
    assert figure.axes[0].get_ylabel() == "pixels"
    for text, message in (("step\n1\n", "holds no gammas"), ("epoch,val/loss\n0,1\n", "holds no gammas")):
        (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            training_curves(tmp_path / "metrics.csv")
    with pytest.raises(CheckpointError, match="there is no"):
        training_curves(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, r"every_n_epochs \(0\) must be at least 1"),
        ({"images": 0}, r"images \(0\) must be at least 1"),
        ({"queries": []}, r"queries \(\[\]\) must be points"),
        ({"queries": [(0.5, 2)]}, "from 0 to 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        AttentionLog(**options)


def test_when_it_looks():
    class Trainer:
        sanity_checking, max_epochs, current_epoch = False, 7, 0
        enable_validation = False

        class state:
            fn = TrainerFn.FITTING

    callback, trainer, due = AttentionLog(every_n_epochs=3), Trainer(), []
    for trainer.current_epoch in range(7):
        due.append(callback._due(trainer))
    assert due == [False, False, True, False, False, True, True]
    with pytest.raises(ConfigError, match=r"has none: give data.val_fraction"):
        callback.on_train_start(trainer, None)
