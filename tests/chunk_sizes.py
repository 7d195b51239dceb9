"""Chunks small enough that small tensors take several."""

import pytest

from sagan_attn.functional import chunks, paths


def chunk_scores(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """Hold so many scores at a time at most, on both roads of the chunked path."""
    monkeypatch.setattr(paths, "CHUNK_SCORES", scores)
    monkeypatch.setattr(chunks, "CHUNK_SCORES", scores)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 1)
