"""What may be asked of torch.compile."""

import difflib

import torch

from sagan_attn.errors import ConfigError

__all__ = ["check_compile"]


def check_compile(compile: bool, mode: str | None, accumulate: int = 1) -> None:
    """Refuse what torch.compile would refuse late, or get wrong.

    Under CUDA graphs a second backward pass adds to gradients whose memory the graph has reused: PyTorch fails, or
    goes on with the last batch's alone (https://github.com/pytorch/pytorch/issues/169545).

    Raises:
        ConfigError: a mode without compile, an unknown mode, or gradients summed over batches under CUDA graphs.
    """
    if mode is None:
        return
    modes = torch._inductor.list_mode_options()  # those of the installed version
    if mode not in modes:
        near = difflib.get_close_matches(mode, modes, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"compile_mode ({mode!r}) must be one of {', '.join(modes)}{hint}")
    if not compile:
        raise ConfigError(f"compile_mode ({mode!r}) needs compile: true")
    if modes[mode].get("triton.cudagraphs") and accumulate > 1:
        raise ConfigError(
            f"compile_mode ({mode!r}) uses CUDA graphs, which do not add up gradients over trainer."
            f"accumulate_grad_batches ({accumulate}) batches: use max-autotune-no-cudagraphs or default"
        )
