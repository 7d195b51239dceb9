"""Controls: what a gain has to be compared with before it is called attention's."""

__all__ = ["BLOCK_CONTROLS", "CONTROLS", "HOST_CONTROLS"]

# In place of the attention block, behind the same gate with the same rates.
BLOCK_CONTROLS = {
    "identity": "every position attends to itself: the block's parameters without its attention",
    "context-mean": "the mean of the map for every position",
    "context-max": "the maximum of the map for every position",
    "se": "squeeze and excitation: a factor for each channel",
    "gc": "global context: one learned summary of the map for every position",
    "conv": "a residual bottleneck of 1x1 convolutions with as many parameters",
}
# The host without a graft.
HOST_CONTROLS = {
    "none": "the host alone",
    "deeper": "the host with one more block of its own at the site",
    "wider": "the host with as many parameters as the grafted one, by width",
    "longer": "the host trained for as long as the grafted one takes",
}
CONTROLS = {**HOST_CONTROLS, **BLOCK_CONTROLS}
