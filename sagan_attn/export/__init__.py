"""Trained models as files that other programs run, each checked against the model before it is written."""

from sagan_attn.export.check import TOLERANCE
from sagan_attn.export.export import FORMATS, export_run
from sagan_attn.export.weights import ExportedModel, load_exported

__all__ = ["FORMATS", "TOLERANCE", "ExportedModel", "export_run", "load_exported"]
