"""Shared by all tests; being here also puts `tests/` on the import path, for `hosts`."""

import sys

import pytest
import torch
from small_runs import SMALL


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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
