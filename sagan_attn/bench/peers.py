"""Blocks that do what `sagan` does, as they would be written or taken from a library instead.

Those of the same form have its weights and compute the same function, by other roads. Those of other forms compute
something else, and say what attention at that size costs elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn.blocks.registry import create_block
from sagan_attn.errors import ConfigError

__all__ = ["DEFAULT_PEERS", "OURS", "PEERS", "Peer", "check_peers", "create_ours"]

Kind = Literal["ours", "same form", "other form"]
OURS = "sagan"
GAMMA = 0.5  # at 0 the block would be the identity


class Convolutions(nn.Module):
    """The parameters of SAGAN's block as public code has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // 8)
        self.query = nn.Conv2d(channels, narrow, 1)
        self.key = nn.Conv2d(channels, narrow, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), GAMMA))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, 1, N, d] and values [B, 1, N, D], as views."""
        query, key, value = (conv(x).flatten(2).transpose(1, 2)[:, None] for conv in (self.query, self.key, self.value))
        return query, key, value

    def joined(self, x: Tensor, rows: Tensor) -> Tensor:
        """x + gamma * rows [B, 1, N, D]."""
        return self.gamma * rows[:, 0].transpose(1, 2).reshape(x.shape) + x


class Plain(Convolutions):
    """With all weights in memory, as most public PyTorch code has it (heykeetae/Self-Attention-GAN and copies)."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        n = height * width
        query = self.query(x).view(b, -1, n).permute(0, 2, 1)
        key = self.key(x).view(b, -1, n)
        attention = torch.softmax(torch.bmm(query, key), dim=-1)  # [B, N, N]
        value = self.value(x).view(b, -1, n)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(b, c, height, width)
        return self.gamma * out + x


class Fused(Convolutions):
    """With torch's `F.scaled_dot_product_attention` on views, as one gets it by replacing the two products."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.rows(x)
        return self.joined(x, F.scaled_dot_product_attention(query, key, value, scale=1.0))


class FusedRows(Convolutions):
    """The same with all in rows: some of torch's fast kernels take values wider than queries, none takes such views."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (rows.contiguous() for rows in self.rows(x))
        return self.joined(x, F.scaled_dot_product_attention(query, key, value, scale=1.0))


class FusedPadded(Convolutions):
    """The same, with queries and keys as wide as the values and all in rows, which its fast kernels need."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.rows(x)
        more = value.shape[-1] - query.shape[-1]
        query, key = F.pad(query, (0, more)), F.pad(key, (0, more))
        return self.joined(x, F.scaled_dot_product_attention(query, key, value.contiguous(), scale=1.0))


class Flex(Convolutions):
    """With torch's FlexAttention, compiled anew for each module: after some shapes torch would stop compiling."""

    def __init__(self, channels: int) -> None:
        from torch.nn.attention.flex_attention import flex_attention  # slow to import

        super().__init__(channels)
        torch.compiler.reset()
        self.attend: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (rows.contiguous() for rows in self.rows(x))
        return self.joined(x, self.attend(query, key, value, scale=1.0))


class MultiHead(nn.Module):
    """`nn.MultiheadAttention` with one head on the positions of a map, behind the same gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)
        self.gamma = nn.Parameter(torch.full((1,), GAMMA))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        out = self.attention(rows, rows, rows, need_weights=False)[0]
        return self.gamma * out.transpose(1, 2).reshape(x.shape) + x


def create_ours(channels: int, path: str = "auto") -> nn.Module:
    """The registered block, with a gate that is open."""
    return create_block(OURS, channels, gamma_init=GAMMA, path=path)


@dataclass(frozen=True)
class Peer:
    """A way to attend on a map: a function of channels, height and width that makes a module.

    Args:
        weight_heads: heads whose N x N weights it holds at once; 0 for none, as far as is known.
    """

    kind: Kind
    create: Callable[[int, int, int], nn.Module]
    weight_heads: int = 0


def _path(path: str) -> Callable[[int, int, int], nn.Module]:
    return lambda channels, height, width: create_ours(channels, path)


def _same(module: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    return lambda channels, height, width: module(channels)


def _timm_non_local(channels: int, height: int, width: int) -> nn.Module:
    from timm.layers.non_local_attn import NonLocalAttn

    return NonLocalAttn(channels)


def _timm_bottleneck(channels: int, height: int, width: int) -> nn.Module:
    from timm.layers.bottleneck_attn import BottleneckAttn

    return BottleneckAttn(channels, feat_size=(height, width))


PEERS: dict[str, Peer] = {
    OURS: Peer("ours", _path("auto")),
    "sagan/materialised": Peer("ours", _path("materialised"), weight_heads=1),
    "sagan/chunked": Peer("ours", _path("chunked")),
    "sagan/sdpa_padded": Peer("ours", _path("sdpa_padded")),
    "sagan/fused": Peer("ours", _path("fused")),
    "plain": Peer("same form", _same(Plain), weight_heads=1),
    "sdpa": Peer("same form", _same(Fused), weight_heads=1),  # where torch falls back to its road without a kernel
    "sdpa-rows": Peer("same form", _same(FusedRows), weight_heads=1),  # as above
    "sdpa-padded": Peer("same form", _same(FusedPadded)),
    "flex": Peer("same form", _same(Flex)),
    "timm-non-local": Peer("other form", _timm_non_local, weight_heads=1),
    "timm-bottleneck": Peer("other form", _timm_bottleneck, weight_heads=4),
    "multihead": Peer("other form", _same(MultiHead), weight_heads=1),
}
# Without those for a GPU: on a CPU flex needs a C++ compiler and minutes, and the kernels do not run.
DEFAULT_PEERS = [name for name in PEERS if name not in ("flex", "sagan/fused")]


def check_peers(names: list[str]) -> list[str]:
    """The names without repetitions, `sagan` first. Raises `ConfigError` for an unknown one."""
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
    return list(dict.fromkeys([OURS, *names]))
