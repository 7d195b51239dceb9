"""Attention maths, without parameters.

Letters, here and everywhere in the library: B batch, C channels, H and W height and width of a map, N = H*W query
positions, M key positions, h heads, d query/key size a head, D value size a head.

The functions are leaves for `torch.fx`: a traced model shows one node a function, so they may look at real shapes
and strides, and at arguments that are None. For that to work they are called through this module
(`functional.attend`), never imported by name.
"""

from torch import fx

from sagan_attn.functional.attention import attention_output, attention_weights
from sagan_attn.functional.maps import (
    add_sinusoids,
    context_mask_of,
    context_of,
    difference,
    gated_residual,
    key_mask,
    merge_heads,
    pointwise,
    pointwise_each,
    pool_map,
    residual,
    split_heads,
    summarize,
    weighted_mean,
)
from sagan_attn.functional.norms import branch_norm, channel_norm, spectrally_normalized
from sagan_attn.functional.paths import attend
from sagan_attn.functional.positions import relative_tables
from sagan_attn.functional.sequences import causal_lens, merge_features, sequence_mask, sequence_of, split_features

__all__ = [
    "add_sinusoids",
    "attend",
    "attention_output",
    "attention_weights",
    "branch_norm",
    "causal_lens",
    "channel_norm",
    "context_mask_of",
    "context_of",
    "difference",
    "gated_residual",
    "key_mask",
    "merge_features",
    "merge_heads",
    "pointwise",
    "pointwise_each",
    "pool_map",
    "relative_tables",
    "residual",
    "sequence_mask",
    "sequence_of",
    "spectrally_normalized",
    "split_features",
    "split_heads",
    "summarize",
    "weighted_mean",
]

for _name in __all__:
    fx.wrap(_name)
