"""Where autocast must not reach."""

import contextlib

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for x's device. Entered only where it is on, so that exported graphs stay free of it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # there is no autocast for meta tensors
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


_UNITS = {
    torch.bfloat16: torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
    torch.float16: False,
}


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype to multiply what has the dtype of x: float32 on a CPU that only emulates half precision."""
    return x.dtype if x.device.type != "cpu" or _UNITS.get(x.dtype, True) else torch.float32
