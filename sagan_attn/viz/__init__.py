"""Pictures of what attention does. matplotlib is imported when the first one is drawn."""

from sagan_attn.viz.curves import training_curves
from sagan_attn.viz.explorer import explorer_page
from sagan_attn.viz.head_figures import head_statistics
from sagan_attn.viz.look import Look, look
from sagan_attn.viz.overlay import attention_overlay
from sagan_attn.viz.record import AttentionRecord, Recording, attention_at, record_attention
from sagan_attn.viz.sheets import attention_sheet, head_matrices
from sagan_attn.viz.site_summary import summary_figure, summary_page

__all__ = [
    "AttentionRecord",
    "Look",
    "Recording",
    "attention_at",
    "attention_overlay",
    "attention_sheet",
    "explorer_page",
    "head_matrices",
    "head_statistics",
    "look",
    "record_attention",
    "summary_figure",
    "summary_page",
    "training_curves",
]
