"""Training classifiers with grafts, and reading runs back."""

from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.run import Run, load_run

__all__ = ["ClassifierModule", "Run", "load_run"]
