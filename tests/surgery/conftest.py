"""Files of saved grafts."""

from pathlib import Path

import pytest
from stored import grafted

from sagan_attn import save_grafts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "attn.safetensors"


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "attn.safetensors"
    save_grafts(grafted({"stage": {"block": "sagan", "pool": 2}, "top": {"block": "nonlocal", "reduction": 4}}), path)
    return path.read_bytes()


@pytest.fixture
def saved(saved_once: bytes, path: Path) -> Path:
    path.write_bytes(saved_once)
    return path
