"""Grafting blocks into a built model, exactly and reversibly."""

from sagan_attn.surgery.graft import graft, grafts_of, is_grafted, ungraft
from sagan_attn.surgery.grafts import Graft, Grafts
from sagan_attn.surgery.sites import Site, sites

__all__ = ["Graft", "Grafts", "Site", "graft", "grafts_of", "is_grafted", "sites", "ungraft"]
