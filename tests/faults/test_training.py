"""A fit, and what is asked of a run, when their files cannot be written."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_results import make
from file_faults import fill, mounted, room_for
from safetensors import safe_open
from small_runs import SMALL

from sagan_attn.__main__ import main as ask
from sagan_attn.files import PART
from sagan_attn.training.cli import main
from sagan_attn.training.run import RunPaths, load_run, read_checkpoint

ROOT = Path(__file__).parents[2]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error: one line, after what Lightning says about the machine."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_room_for_the_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with room_for(100_000):
        code = main(["fit", *SMALL, "--data.n_train=32", "--run_dir", str(tmp_path / "run")])
    assert code == 1
    assert last_line(capsys) == f"error: [Errno 27] File too large: '{tmp_path}/run/checkpoints/best.ckpt'"
    assert not (tmp_path / "run").exists(), "a fit that failed in its first epoch leaves nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(0, "run"), (4096, "config.yaml"), (100_000, ".ckpt")])
def test_no_room_at_all(size: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with mounted(tmp_path, 4 << 20) as disk:
        fill(disk, size)
        assert main(["fit", *SMALL, "--data.n_train=32", "--run_dir", str(disk / "run")]) == 1
        line = last_line(capsys)
        assert "No space left on device" in line
        assert name in line
        assert os.listdir(disk) == ["filler"]


@pytest.mark.slow
def test_no_room_for_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with mounted(tmp_path, 16 << 20) as disk:
        folder = disk / "run"
        assert main(["fit", *SMALL, "--data.n_train=32", "--run_dir", str(folder)]) == 0
        for command, name in (("test", "test_logits.safetensors"), ("predict", "predictions.csv")):
            capsys.readouterr()
            call = [command, "--config", str(folder / "config.yaml"), "--run_dir", str(folder)]
            (folder / name).write_bytes(b"what was there")
            before = contents(folder)
            fill(disk, 0)
            assert main(call) == 1
            assert last_line(capsys) == f"error: [Errno 28] No space left on device: '{folder / name}'"
            assert contents(folder) == before
            (disk / "filler").unlink()
            assert main(call) == 0
            assert contents(folder)[name] != before[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "maps --checkpoint {run} --at local --images dataset:2 --out {disk}/sheet.png",
        "maps --checkpoint {run} --at local --images dataset:2 --out {disk}/sheet.svg",
        "explore --checkpoint {run} --at local --images dataset:2 --out {disk}/page.html",
        "bench block --quick --repetitions 1 --json {disk}/bench.json --plot {disk}/bench.pdf",
        "report {disk}/ablation --paper --csv {disk}/table.csv",
    ],
)
def test_no_room_for_what_is_asked(call: str, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with mounted(tmp_path, 16 << 20) as disk:
        make(seeds=6).write(disk / "ablation")
        words = call.format(run=small_run, disk=disk).split()
        assert ask(words) == 0
        capsys.readouterr()
        before = contents(disk)
        fill(disk, 0)
        assert ask(words) in (1, 2)
        line = last_line(capsys)
        assert "No space left on device" in line
        assert str(disk) in line
        (disk / "filler").unlink()
        assert contents(disk) == before


def test_no_room_for_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Which a buffer hides until the end."""
    with suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = ask(["sites", "resnet18", "--image-size", "64"])
    monkeypatch.undo()
    assert code == 1
    assert last_line(capsys) == "error: [Errno 28] No space left on device"


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(tmp_path: Path):
    """The run ends with 1 and one line; its files are whole; with room again, it goes on to its end."""
    with mounted(tmp_path, 16 << 20) as disk:
        paths = RunPaths(disk / "run")
        config = [*SMALL, "--trainer.max_epochs=30", "--run_dir", str(paths.folder)]
        call = [sys.executable, "train.py", "fit", *config, "--resume", "auto"]
        with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as fit:
            while not paths.checkpoint("last").is_file():
                assert fit.poll() is None, fit.communicate()
                time.sleep(0.05)
            fill(disk, 500_000)  # less than a checkpoint
            _, errors = fit.communicate()
        assert fit.returncode == 1, errors
        assert "Traceback" not in errors
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert "No space left on device" in line
        assert ".ckpt" in line or "metrics.csv" in line
        assert [path for path in disk.rglob("*") if path.name.endswith(PART)] == []
        for name in ("best", "last"):
            read_checkpoint(paths.checkpoint(name))
            load_run(paths.folder, name)
        epochs = pd.read_csv(paths.metrics)["epoch"].tolist()
        assert epochs == list(range(len(epochs)))
        assert len(epochs) < 30
        (disk / "filler").unlink()
        ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert pd.read_csv(paths.metrics)["epoch"].tolist() == list(range(30))
        assert main(["test", "--config", str(paths.config), "--run_dir", str(paths.folder)]) == 0
        with safe_open(paths.test_logits, "pt") as file:
            assert len(file.get_tensor("logits")) == 64


@pytest.mark.slow
def test_files_opened_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By whatever library: none but those beside others, and TensorBoard's, which are appended to."""
    opened: list[str] = []
    listening = True

    def listen(event: str, arguments: Any) -> None:
        if event == "open" and listening and isinstance(arguments[0], (str, bytes)):
            _, mode, flags = arguments
            # an old file is opened, and left, to see whether it may be written
            if flags & (os.O_CREAT | os.O_TRUNC | os.O_APPEND) or (isinstance(mode, str) and set(mode) & set("wax+")):
                opened.append(os.fsdecode(arguments[0]))

    sys.addaudithook(listen)  # which nothing removes
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = tmp_path / "run"
    ablation = make(seeds=6).write(tmp_path / "ablation")
    look = ["--checkpoint", str(run), "--at", "local", "--images", "dataset:2", "--out"]
    before = len(opened)
    assert main(["fit", *SMALL, "--data.n_train=64", "--run_dir", str(run)]) == 0
    for command in ("test", "predict"):
        assert main([command, "--config", str(run / "config.yaml"), "--run_dir", str(run)]) == 0
    assert ask(["maps", *look, str(tmp_path / "sheet.pdf")]) == 0
    assert ask(["explore", *look, str(tmp_path / "page.html")]) == 0
    assert ask(["report", str(ablation), "--csv", str(tmp_path / "table.csv")]) == 0
    listening = False
    ours = [Path(name) for name in opened[before:] if name.startswith(str(tmp_path))]
    assert len([path for path in ours if path.name.endswith(PART)]) > 20
    others = {path.relative_to(tmp_path).parts[:2] for path in ours if not path.name.endswith(PART)}
    assert others == {("run", "tensorboard")}
