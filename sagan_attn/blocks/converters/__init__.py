"""State dicts of other implementations for our blocks, and those of our blocks for other implementations.

Loading theirs into ours, and ours into theirs:

    block.load_state_dict(convert(theirs.state_dict()))
    theirs.load_state_dict(convert_back(block.state_dict(), "timm-nonlocal"))
"""

from sagan_attn.blocks.converters.conversion import convert, convert_back, sources

__all__ = ["convert", "convert_back", "sources"]
