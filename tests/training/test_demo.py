"""The default run."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small_runs import CONFIGS

from sagan_attn.training import demo
from sagan_attn.training.cli import main
from sagan_attn.training.stopping import StoppedBySignalError


def small_config(folder):
    config = yaml.safe_load((CONFIGS / "lookup.yaml").read_text())
    config["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    config["model"]["schedule"]["warmup_epochs"] = 0.5
    config["data"]["init_args"] |= {"n_train": 128, "n_val": 32, "n_test": 40, "batch_size": 32}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(default_config=config) == 0
    (made,) = (folder / "runs").iterdir()
    return made, json.loads((made / "results.json").read_text()), capsys.readouterr().out


def test_it_compares_host_control_and_attention(tmp_path, monkeypatch, capsys):
    made, results, output = run(small_config(tmp_path), tmp_path, monkeypatch, capsys)
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["host", "context-max", "sagan"]
    assert rows["host"]["gamma"] is None
    # 128 channels: the attention block has one bias more, of the key, which has no effect
    extra = {name: row["parameters"] - rows["host"]["parameters"] for name, row in rows.items()}
    assert extra == {"host": 0, "context-max": 20_625, "sagan": 20_641}
    for variant, row in rows.items():
        saved = json.loads((made / variant / "test_metrics.json").read_text())
        assert saved["test/accuracy"] == pytest.approx(row["accuracy"])
        assert saved["images"] == 40
        assert (made / variant / "checkpoints" / "best.ckpt").is_file()
    with Image.open(made / "attention.png") as picture:
        assert picture.size[0] > 600
    assert "host + context-max (control)" in output
    assert "attention.png" in output


def test_what_is_said_when_it_is_stopped(tmp_path, monkeypatch, capsys):
    folders = []

    def fit(arguments):
        folders.append(Path(arguments[-1]))
        raise StoppedBySignalError(signal.SIGTERM, folders[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SaganCLI", fit)
    assert main(default_config=small_config(tmp_path)) == 143
    said = capsys.readouterr().err
    assert f"train.py fit --config {folders[0] / 'config.yaml'} --resume auto goes on with this one" in said
    assert "the comparison itself begins anew" in said


@pytest.mark.slow
def test_attention_solves_the_task_and_looks_at_the_right_square(tmp_path, monkeypatch, capsys):
    _, results, _ = run(CONFIGS / "lookup.yaml", tmp_path, monkeypatch, capsys)
    accuracy = {row["variant"]: row["accuracy"] for row in results["rows"]}
    assert accuracy["host"] < 0.45
    assert accuracy["sagan"] > 0.95
    assert accuracy["sagan"] > accuracy["context-max"] + 0.1
    assert results["over_0.9"] >= 495
