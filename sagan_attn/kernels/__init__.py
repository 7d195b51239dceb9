"""Attention as one kernel on a GPU, written in Triton: `functional.attend(..., path="fused")`.

`op` is the door: operators of torch with their derivatives. It reaches `launch`, and with it Triton, on the first call.
`launch` chooses tiles and launches the kernels of `forward` and `backward`, which share `tiles`.
"""
