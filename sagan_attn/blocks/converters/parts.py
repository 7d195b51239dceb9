"""Entries of the parts that implementations are made of: linear maps in their ways of storing them, and norms."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from sagan_attn.blocks.converters.entry import Entry, Size
from sagan_attn.blocks.converters.layout import Implied

__all__ = [
    "HOOK",
    "HOOK_U",
    "MAP",
    "OWN",
    "PARAMETRIZATION",
    "PLAIN",
    "ROWS",
    "U0",
    "linear",
    "norm",
    "singular",
    "tensor",
]

Style = dict[str, str]
"""How a weight is stored: suffixes of theirs and of ours."""

PLAIN: Style = {"weight": "weight"}
PARAMETRIZATION: Style = {  # torch.nn.utils.parametrizations.spectral_norm
    "parametrizations.weight.original": "weight",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
HOOK: Style = {"weight_orig": "weight", "weight_u": "weight_u", "weight_v": "weight_v"}  # torch.nn.utils.spectral_norm
HOOK_U: Style = {"weight_orig": "weight", "weight_u": "weight_u"}  # the same without the right vector
U0: Style = {"weight": "weight", "u0": "weight_u", "sv0": ""}  # BigGAN-PyTorch; sv0 is for its logs
OWN: Style = {"weight": "weight", "weight_u": "weight_u", "weight_v": "weight_v"}  # `SpectralPointwise`

MAP = (4, 3, 2)
"""Dimensions of the weights of our blocks on maps, the one that is written first."""
ROWS = (2, 4, 3)
"""The same for sequences; those of maps load them as well."""


def linear(
    theirs: str,
    ours: str,
    rows: Size,
    columns: Size,
    *,
    bias: bool,
    style: Style = PLAIN,
    ranks: tuple[int, ...] = (4,),
    our_ranks: tuple[int, ...] = MAP,
) -> tuple[Entry, ...]:
    """A linear map or convolution of size 1 from columns to rows features, called so in theirs and in ours."""
    entries = []
    for suffix, own in style.items():
        key, our_key = f"{theirs}.{suffix}", f"{ours}.{own}"
        if own == "weight":
            entries.append(Entry(key, (our_key,), (rows,), (columns,), ranks, our_ranks))
        elif own:
            leading = int(suffix == "u0")
            size = rows if own == "weight_u" else columns
            entries.append(Entry(key, (our_key,), (size,), (), (1 + leading,), (1,), leading))
        else:
            entries.append(Entry(key, (), (1,), (), (1,), (1,), derive=lambda tensors: _estimate(tensors, ours)))
    if bias:
        entries.append(tensor(f"{theirs}.bias", f"{ours}.bias", rows))
    return tuple(entries)


def norm(theirs: str, ours: str, size: Size, *, bias: bool = True, running: bool = False) -> tuple[Entry, ...]:
    """A layer norm, or with running statistics a batch norm."""
    names = ["weight", *["bias"] * bias, *["running_mean", "running_var"] * running]
    entries = [tensor(f"{theirs}.{name}", f"{ours}.{name}", size) for name in names]
    if running:
        count = "num_batches_tracked"  # torch before 0.4.1 did not write it
        entries.append(Entry(f"{theirs}.{count}", (f"{ours}.{count}",), (1,), (), (0,), (0,), optional=True))
    return tuple(entries)


def tensor(theirs: str, ours: str, *sizes: Size, ranks: tuple[int, ...] | None = None) -> Entry:
    """A tensor of these sizes."""
    return Entry(theirs, (ours,), sizes[:1], sizes[1:], ranks or (len(sizes),), (len(sizes),))


def singular(ours: str, columns: Size) -> Implied:
    """The right singular vector where only the left one is stored: one step of power iteration from there gives both.

    That is the step which the codes without the right one make in eval mode before they divide.
    """

    def make(tensors: dict[str, Tensor]) -> None:
        matrix = tensors[f"{ours}.weight"].flatten(1)
        v = F.normalize(matrix.T @ tensors[f"{ours}.weight_u"], dim=0, eps=1e-12)
        tensors |= {f"{ours}.weight_v": v, f"{ours}.weight_u": F.normalize(matrix @ v, dim=0, eps=1e-12)}

    def fold(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{ours}.weight_v"]

    return Implied(f"{ours}.weight_v", columns, make, fold)


def _estimate(tensors: Mapping[str, Tensor], ours: str) -> Tensor:
    """The estimate u.W v of the largest singular value, [1]."""
    matrix = tensors[f"{ours}.weight"].flatten(1)
    return (tensors[f"{ours}.weight_u"] @ matrix @ tensors[f"{ours}.weight_v"]).reshape(1)
