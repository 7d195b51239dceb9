"""Add self-attention to a CNN you already have, without changing what it knows."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from sagan_attn.surgery.hub import HubGrafts
    from sagan_attn.viz.record import record_attention
else:  # hidden from type checkers, which would take any name for one of this module

    def __getattr__(name: str) -> object:
        """These when they are asked for: importing the package loads torch alone, without huggingface_hub."""
        if name == "HubGrafts":
            from sagan_attn.surgery.hub import HubGrafts

            return HubGrafts
        if name == "record_attention":
            from sagan_attn.viz.record import record_attention

            return record_attention
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Graft",
    "GraftSummary",
    "Grafts",
    "HubGrafts",
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
    "record_attention",
    "save_grafts",
    "sites",
    "summary",
    "ungraft",
]

__version__ = "0.1.0"
