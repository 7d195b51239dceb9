"""Add self-attention to a CNN you already have, without changing what it knows."""

from sagan_attn.blocks import SelfAttention2d
from sagan_attn.errors import SaganAttnError
from sagan_attn.surgery import (
    Graft,
    Grafts,
    GraftSummary,
    Site,
    freeze_host,
    fuse,
    graft,
    grafts_of,
    head_importance,
    is_grafted,
    load_grafts,
    prune_heads,
    save_grafts,
    sites,
    summary,
    ungraft,
)

__all__ = [
    "Graft",
    "GraftSummary",
    "Grafts",
    "SaganAttnError",
    "SelfAttention2d",
    "Site",
    "freeze_host",
    "fuse",
    "graft",
    "grafts_of",
    "head_importance",
    "is_grafted",
    "load_grafts",
    "prune_heads",
    "save_grafts",
    "sites",
    "summary",
    "ungraft",
]

__version__ = "0.1.0"
