"""Pictures of what attention does. matplotlib is imported when the first one is drawn."""

from sagan_attn.viz.overlay import attention_overlay
from sagan_attn.viz.record import attention_at

__all__ = ["attention_at", "attention_overlay"]
