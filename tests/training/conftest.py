"""A small run, made once, that several tests look at."""

import sys

import pytest
from small_runs import SMALL

@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    """LightningCLI warns when it is given arguments while the process has some of its own."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Folder of a finished `fit` with a graft, on a few lookup images."""
    from sagan_attn.training.cli import main

    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        assert main(["fit", *SMALL, "--run_dir", str(folder)]) == 0
    return folder
