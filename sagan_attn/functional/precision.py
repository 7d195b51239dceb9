"""Where autocast must not reach."""

import contextlib

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for x's device. Entered only where it is on, so that exported graphs stay free of it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # there is no autocast for meta tensors
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
