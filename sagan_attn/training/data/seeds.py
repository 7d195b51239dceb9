"""Seeds worked out from what they are for, never drawn from a stream: the same question gets the same answer
after a resume, on another number of workers and whatever else has used the global generator."""

import hashlib

__all__ = ["batch_seed", "stateless_seed"]


def stateless_seed(purpose: str, *parts: int) -> int:
    """A seed in [0, 2**63) for `purpose`; unrelated for any two different (purpose, parts)."""
    text = "/".join([purpose, *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def batch_seed(seed: int, epoch: int, batch_idx: int, rank: int) -> int:
    """The seed of one training batch's augmentation, in [0, 2**63)."""
    return stateless_seed("batch", seed, epoch, batch_idx, rank)
