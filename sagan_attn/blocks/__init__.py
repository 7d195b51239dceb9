"""Attention blocks: on feature maps, each keeping the shape of its input and starting as the identity; on sequences."""

from sagan_attn.blocks.bottleneck import Bottleneck2d
from sagan_attn.blocks.channel import GCBlock2d, SqueezeExcite2d
from sagan_attn.blocks.context import GlobalContext2d
from sagan_attn.blocks.converters import convert, convert_back, sources
from sagan_attn.blocks.gate import Gated
from sagan_attn.blocks.identity import IdentityAttention2d
from sagan_attn.blocks.multihead import CrossAttention2d, MultiHeadAttention2d
from sagan_attn.blocks.nonlocal_ import NonLocal2d
from sagan_attn.blocks.registry import block_names, create_block
from sagan_attn.blocks.sagan import SelfAttention2d
from sagan_attn.blocks.sequence import MultiHeadAttention
from sagan_attn.blocks.sequence_layers import Decoder, DecoderLayer, Encoder, EncoderLayer
from sagan_attn.blocks.transformer import DecoderBlock2d, EncoderBlock2d

__all__ = [
    "Bottleneck2d",
    "CrossAttention2d",
    "Decoder",
    "DecoderBlock2d",
    "DecoderLayer",
    "Encoder",
    "EncoderBlock2d",
    "EncoderLayer",
    "GCBlock2d",
    "Gated",
    "GlobalContext2d",
    "IdentityAttention2d",
    "MultiHeadAttention",
    "MultiHeadAttention2d",
    "NonLocal2d",
    "SelfAttention2d",
    "SqueezeExcite2d",
    "block_names",
    "convert",
    "convert_back",
    "create_block",
    "sources",
]
