"""Grafting blocks into a built model, exactly and reversibly."""

from sagan_attn.surgery.branch import branch_share
from sagan_attn.surgery.freeze import freeze_host
from sagan_attn.surgery.fuse import fuse
from sagan_attn.surgery.graft import graft, grafts_of, is_grafted, ungraft
from sagan_attn.surgery.grafts import Graft, Grafts
from sagan_attn.surgery.heads import prune_heads
from sagan_attn.surgery.importance import head_importance
from sagan_attn.surgery.interventions import foreign_keys, uniform_attention
from sagan_attn.surgery.sites import Site, sites
from sagan_attn.surgery.store import load_grafts, save_grafts
from sagan_attn.surgery.summary import GraftSummary, summary

__all__ = [
    "Graft",
    "GraftSummary",
    "Grafts",
    "Site",
    "branch_share",
    "foreign_keys",
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
    "uniform_attention",
]
