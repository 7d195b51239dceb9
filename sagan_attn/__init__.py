"""Add self-attention to a CNN you already have, without changing what it knows."""

from sagan_attn.blocks import SelfAttention2d
from sagan_attn.errors import SaganAttnError
from sagan_attn.surgery import Graft, Grafts, Site, graft, grafts_of, is_grafted, sites, ungraft

__all__ = [
    "Graft",
    "Grafts",
    "SaganAttnError",
    "SelfAttention2d",
    "Site",
    "graft",
    "grafts_of",
    "is_grafted",
    "sites",
    "ungraft",
]

__version__ = "0.1.0"
