"""The canary, and a run folder from elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from canary import Canary, canary_in


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    folder = tmp_path / "mine"
    folder.mkdir()
    with canary_in(folder) as made:
        yield made
