"""Which code computed a result."""

import hashlib
from functools import cache
from pathlib import Path

__all__ = ["code_digest"]


@cache
def code_digest() -> str:
    """sha256 of the package's sources, as they were at the first call in this process or the one it was forked from."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
