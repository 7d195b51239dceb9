"""How the output lies in memory."""

from torch import Tensor

__all__ = ["output_like"]


def output_like(value: Tensor, n: int) -> Tensor:
    """Room for an output [B, h, N, D] in the layout of the values [B, h, M, D], so that a map stays one.

    In columns for channels first, in rows with the heads inside for channels last, else in rows.
    """
    b, heads, _, size = value.shape
    if value.stride(-1) != 1 and value.stride(-2) == 1:
        return value.new_empty(b, heads, size, n).mT
    if value.stride(1) < value.stride(2):
        return value.new_empty(b, n, heads, size).transpose(1, 2)
    return value.new_empty(b, heads, n, size)
