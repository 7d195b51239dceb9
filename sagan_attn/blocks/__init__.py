"""Attention blocks for feature maps; each keeps the shape of its input and starts as the identity."""

from sagan_attn.blocks.context import GlobalContext2d
from sagan_attn.blocks.gate import Gated
from sagan_attn.blocks.registry import block_names, create_block
from sagan_attn.blocks.sagan import SelfAttention2d

__all__ = ["Gated", "GlobalContext2d", "SelfAttention2d", "block_names", "create_block"]
