"""Every registered form once more, from its published formula alone: plain einsum and loops, one sum at a time.

Nothing of the library is called. A block's numbers come in as a dict of tensors, so that gradients can be taken of
the same tensors on both sides: `parameters_of(block)`. Meant for float64.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]

RELATIVE: dict[str, Any] = {"position": "relative", "position_size": (6, 8)}
SCALED: dict[str, Any] = {"position": "relative_scaled", "position_size": (5, 7)}
SINUSOIDAL: dict[str, Any] = {"position": "sinusoidal"}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("sagan", {}),
    ("sagan", {"heads": 2}),
    ("sagan", {"heads": 4, "value_reduction": 2}),
    ("sagan", {"pool": 2}),
    ("sagan", {"pool": 3, "heads": 2, "bias": False}),
    ("sagan", {"scale": 0.3}),
    ("sagan", {"scale": "sqrt", "heads": 2}),
    ("sagan", {"reduction": 2, "scale": "sqrt", "spectral_norm": True}),
    ("sagan", {**RELATIVE, "heads": 2}),
    ("sagan", {**SCALED, "scale": "sqrt"}),
    ("sagan", {**SINUSOIDAL, "pool": 2}),
    ("sagan-paper", {}),
    ("sagan-paper", {"heads": 2, "pool": 2}),
    ("biggan", {}),
    ("biggan", {"pool": 3}),
    ("fastai", {}),
    ("botnet", {}),
    ("botnet", {"position_size": (6, 8)}),
    ("botnet", {**SCALED, "heads": 2}),
    ("nonlocal", {}),
    ("nonlocal", {"scale": "sqrt", "bias": False}),
    ("nonlocal", {"scale": 0.2, "norm": False, "reduction": 4}),
    *[
        ("nonlocal", {"mode": mode, **pooling})
        for mode in ("gaussian", "dot_product", "concatenation")
        for pooling in ({}, {"pool": 2}, {"pool": 2, "pool_first": True})
    ],
    ("nonlocal-caffe2", {}),
    ("nonlocal-caffe2", {"mode": "dot_product"}),
    ("nonlocal-alexhex7", {}),
    ("nonlocal-alexhex7", {"norm": False, "mode": "concatenation"}),
    ("nonlocal-mmcv", {}),
    ("nonlocal-mmcv", {"norm": True, "reduction": 1}),
    ("nonlocal-mmcv", {"mode": "gaussian"}),
    ("nonlocal-timm", {}),
    ("multihead", {}),
    ("multihead", {"heads": 2, "bias": True, "reduction": 2}),
    ("multihead", {"heads": 1, "scale": None}),
    ("multihead", {"scale": 0.1}),
    ("multihead", RELATIVE),
    ("multihead", SCALED),
    ("multihead", SINUSOIDAL),
    ("additive", {}),
    ("additive", {"heads": 2, "bias": True, "reduction": 4}),
    ("cross", {}),
    ("cross", {"score": "additive", "heads": 2}),
    ("cross", {"bias": True, "scale": None, **SINUSOIDAL}),
    ("encoder", {}),
    ("encoder", {"norm_first": False, "activation": "relu", "heads": 2}),
    ("encoder", {"bias": False, "expansion": 2, **RELATIVE}),
    ("decoder", {}),
    ("decoder", {"norm_first": False, "activation": "relu", "bias": False}),
    ("decoder", SINUSOIDAL),
    ("context-max", {}),
    ("context-mean", {"reduction": 4}),
    ("identity", {}),
    ("identity", {"reduction": 2}),
    ("conv", {}),
    ("conv", {"parameters": 500}),
    ("se", {}),
    ("se", {"reduction": 2}),
    ("gc", {}),
    ("gc", {"reduction": 4}),
]


def reference(
    name: str,
    options: dict[str, Any],
    parameters: Parameters,
    x: Tensor,
    context: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """The output of the form `name` with `options` on a map x [B, C, H, W].

    `context` is the second map of `cross` and `decoder`, x or what has become of it if None; `training` makes batch
    norms use the statistics of the batch.
    """
    form, published = FORMS[name]
    given = published | {key: value for key, value in options.items() if key not in BUILT_IN}
    if form in (cross, decoder):
        given["context"] = context
    if form is non_local:
        given["training"] = training
    return form(parameters, x, **given)


def parameters_of(block: nn.Module) -> Parameters:
    """Parameters and buffers by name."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


@torch.no_grad()
def fill(block: nn.Module, seed: int = 1) -> nn.Module:
    """Numbers without structure for every parameter and statistic of the block, also those that start at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in parameters_of(block).items():
        if key.endswith(("num_batches_tracked", "weight_u", "weight_v")):
            continue
        number = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if key.endswith("running_var"):
            number = 0.5 + number.abs()
        elif value.dim() > 1:
            number = number * value[0].numel() ** -0.5
        value.copy_(number if value.dim() > 1 or value.numel() > 1 else torch.full_like(number, 0.8))
    for module in block.modules():
        if hasattr(module, "weight_u"):
            left, _, right = torch.linalg.svd(module.weight[:, :, 0, 0].double())
            near = 0.05  # the stored vectors are estimates
            module.weight_u.copy_(unit(left[:, 0] + near * left[:, -1]))
            module.weight_v.copy_(unit(right[0] + near * right[-1]))
    return block


# --- what the forms are made of


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


def conv(p: Parameters, name: str, x: Tensor) -> Tensor:
    """1x1 convolution, its weight over u.W v where it is spectrally normalised."""
    weight = p[f"{name}.weight"].flatten(1)
    if f"{name}.weight_u" in p:
        weight = weight / torch.einsum("o,oc,c->", p[f"{name}.weight_u"], weight, p[f"{name}.weight_v"])
    y = torch.einsum("bchw,oc->bohw", x, weight)
    return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y


def pooled(x: Tensor, size: int, whole: bool = False) -> Tensor:
    """Maximum over windows of size x size, the last ones cut off by the edge; of whole windows alone, if there are."""
    whole = whole and min(x.shape[2:]) >= size
    starts = [range(0, side - size + 1 if whole else side, size) for side in x.shape[2:]]
    rows = [[x[:, :, i : i + size, j : j + size].amax(dim=(2, 3)) for j in starts[1]] for i in starts[0]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def softmax(scores: Tensor) -> Tensor:
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def batch_norm(p: Parameters, name: str, x: Tensor, training: bool) -> Tensor:
    mean, variance = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    if training:
        mean = x.mean(dim=(0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    ready = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return ready * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    """Over the channels of each position."""
    centred = x - x.mean(dim=1, keepdim=True)
    ready = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    ready = ready * p[f"{name}.weight"][:, None, None]
    return ready + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else ready


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def offset_vector(table: Tensor, offset: int, size: int) -> Tensor:
    """The vector of an offset on a side of `size`, from a table made for any size, linear between its rows."""
    centre = (len(table) - 1) // 2
    if size == 1 or size - 1 == centre:
        return table[centre + offset]
    place = centre + offset * centre / (size - 1)
    low = min(max(math.floor(place), 0), 2 * centre)
    part = place - low
    return (1 - part) * table[low] + part * table[min(low + 1, 2 * centre)]


def offset_vectors(height_rel: Tensor, width_rel: Tensor, height: int, width: int) -> Tensor:
    """Row plus column vector of the way from each query to each key, [N, M, d]."""
    places = [(i, j) for i in range(height) for j in range(width)]
    by_row = {o: offset_vector(height_rel, o, height) for o in range(1 - height, height)}
    by_column = {o: offset_vector(width_rel, o, width) for o in range(1 - width, width)}
    return torch.stack([torch.stack([by_row[ik - iq] + by_column[jk - jq] for ik, jk in places]) for iq, jq in places])


def with_sinusoids(x: Tensor) -> Tensor:
    """Quarters of the channels: sine of row, sine of column, cosine of row, cosine of column."""
    _, c, height, width = x.shape
    added = torch.zeros(c, height, width, dtype=x.dtype)
    for channel in range(c):
        quarter, band = divmod(channel, c // 4)
        wave = math.sin if quarter < 2 else math.cos
        for i in range(height):
            for j in range(width):
                added[channel, i, j] = wave((j if quarter % 2 else i) / 10000 ** (band / (c // 4)))
    return x + added


def factor(scale: float | str | None, size: int, channels: int) -> float:
    return {None: 1.0, "sqrt": 1 / math.sqrt(size), "input": 1 / math.sqrt(channels)}.get(scale, scale)


def multi_head(p: Parameters, x: Tensor, context: Tensor, heads: int, scale, position, score="dot", pool=1) -> Tensor:
    """Softmax attention from x to the context, head after head, and the `output` convolution where there is one."""
    asking, answering = (with_sinusoids(x), with_sinusoids(context)) if position == "sinusoidal" else (x, context)
    query = conv(p, "query", asking).flatten(2)
    key, value = pooled(conv(p, "key", answering), pool).flatten(2), pooled(conv(p, "value", context), pool).flatten(2)
    size = query.shape[1] // heads
    scale = factor(scale, size, x.shape[1])
    if position in ("relative", "relative_scaled"):
        offsets = offset_vectors(p["height_rel"], p["width_rel"], *x.shape[2:])
    outputs = []
    for head, (q, k, v) in enumerate(zip(*(t.chunk(heads, dim=1) for t in (query, key, value)), strict=True)):
        if score == "additive":
            scores = torch.einsum("bdij,d->bij", torch.tanh(q[..., None] + k[..., None, :]), p["score_vector"][head])
        else:
            scores = scale * torch.einsum("bdi,bdj->bij", q, k)
        if position in ("relative", "relative_scaled"):
            scores = scores + (1 if position == "relative" else scale) * torch.einsum("bdi,ijd->bij", q, offsets)
        outputs.append(torch.einsum("bij,bdj->bdi", softmax(scores), v))
    branch = torch.cat(outputs, dim=1).unflatten(2, x.shape[2:])
    return conv(p, "output", branch) if "output.weight" in p else branch


def within(p: Parameters, name: str) -> Parameters:
    return {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}


# --- the forms


def sagan(p: Parameters, x: Tensor, heads=1, scale=None, pool=1, position=None) -> Tensor:
    return p["gamma"] * multi_head(p, x, x, heads, scale, position, pool=pool) + x


def fastai(p: Parameters, x: Tensor) -> Tensor:
    """As fastai writes it, whose query is our key: the softmax is over dim 1 of f^T g."""
    f, g, h = (conv(p, name, x).flatten(2) for name in ("key", "query", "value"))
    scores = torch.einsum("bdi,bdj->bij", f, g)
    powers = (scores - scores.amax(dim=1, keepdim=True)).exp()
    beta = powers / powers.sum(dim=1, keepdim=True)
    return p["gamma"] * torch.einsum("bci,bij->bcj", h, beta).unflatten(2, x.shape[2:]) + x


def non_local(
    p: Parameters, x: Tensor, mode="embedded_gaussian", scale=None, pool=1, pool_first=False, training=False
) -> Tensor:
    def low(x: Tensor) -> Tensor:
        return pooled(x, pool, whole=True)

    def of_keys(name: str) -> Tensor:
        return (conv(p, name, low(x)) if pool_first else low(conv(p, name, x))).flatten(2)

    if mode == "gaussian":
        theta, phi = x.flatten(2), low(x).flatten(2)
    else:
        theta, phi = conv(p, "query", x).flatten(2), of_keys("key")
    g = of_keys("value")
    m = g.shape[2]
    if mode == "concatenation":
        n, vector = theta.shape[2], p["score_vector"][0]
        pairs = torch.cat([theta[..., None].expand(-1, -1, n, m), phi[:, :, None].expand(-1, -1, n, m)], dim=1)
        weights = torch.einsum("bcij,c->bij", pairs, vector).clamp(min=0) / m
    else:
        scores = torch.einsum("bci,bcj->bij", theta, phi)
        if mode == "embedded_gaussian":
            scores = factor(scale, theta.shape[1], x.shape[1]) * scores
        weights = scores / m if mode == "dot_product" else softmax(scores)
    branch = conv(p, "output", torch.einsum("bij,bcj->bci", weights, g).unflatten(2, x.shape[2:]))
    return x + (batch_norm(p, "norm", branch, training) if "norm.weight" in p else branch)


def multihead(p: Parameters, x: Tensor, heads=4, scale="sqrt", position=None, score="dot") -> Tensor:
    return x + multi_head(p, x, x, heads, scale, position, score)


def cross(p: Parameters, x: Tensor, heads=4, scale="sqrt", position=None, score="dot", context=None) -> Tensor:
    return x + multi_head(p, x, x if context is None else context, heads, scale, position, score)


def encoder(p: Parameters, x: Tensor, heads=4, norm_first=True, activation="gelu", position=None) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return multi_head(within(p, "attention"), x, x, heads, "sqrt", position)

    return layers(p, x, [attention, ffn(p, activation)], norm_first)


def decoder(p: Parameters, x: Tensor, heads=4, norm_first=True, activation="gelu", position=None, context=None):
    def attention(x: Tensor) -> Tensor:
        return multi_head(within(p, "attention"), x, x, heads, "sqrt", position)

    def second(x: Tensor) -> Tensor:
        return multi_head(within(p, "cross"), x, x if context is None else context, heads, "sqrt", None)

    return layers(p, x, [attention, second, ffn(p, activation)], norm_first)


def ffn(p: Parameters, activation: str):
    act = gelu if activation == "gelu" else lambda x: x.clamp(min=0)
    return lambda x: conv(p, "linear2", act(conv(p, "linear1", x)))


def layers(p: Parameters, x: Tensor, parts: list, norm_first: bool) -> Tensor:
    for number, part in enumerate(parts, 1):
        if norm_first:
            x = x + part(layer_norm(p, f"norm{number}", x))
        else:
            x = layer_norm(p, f"norm{number}", x + part(x))
    return x


def global_context(p: Parameters, x: Tensor, reduce: str) -> Tensor:
    features = conv(p, "value", x) + conv(p, "expand", conv(p, "squeeze", x).clamp(min=0))
    summary = features.flatten(2).amax(dim=2) if reduce == "max" else features.flatten(2).mean(dim=2)
    return x + p["gamma"] * summary[:, :, None, None]


def identity(p: Parameters, x: Tensor) -> Tensor:
    return x + p["gamma"] * conv(p, "value", x)


def bottleneck(p: Parameters, x: Tensor) -> Tensor:
    return x + p["gamma"] * conv(p, "expand", conv(p, "squeeze", x).clamp(min=0))


def squeeze_excite(p: Parameters, x: Tensor) -> Tensor:
    hidden = conv(p, "squeeze", x.flatten(2).mean(dim=2)[:, :, None, None]).clamp(min=0)
    excited = x / (1 + (-conv(p, "expand", hidden)).exp())
    return (1 - p["gamma"]) * x + p["gamma"] * excited


def global_context_block(p: Parameters, x: Tensor) -> Tensor:
    weights = softmax(conv(p, "score", x).flatten(2))  # [B, 1, N]
    context = torch.einsum("bcn,bn->bc", x.flatten(2), weights[:, 0])[:, :, None, None]
    hidden = layer_norm(p, "norm", conv(p, "squeeze", context)).clamp(min=0)
    return x + p["gamma"] * conv(p, "expand", hidden)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sagan": (sagan, {}),
    "sagan-paper": (sagan, {}),
    "biggan": (sagan, {"pool": 2}),
    "fastai": (fastai, {}),
    "botnet": (sagan, {"heads": 4, "scale": "sqrt", "position": "relative"}),
    "nonlocal": (non_local, {}),
    "nonlocal-caffe2": (non_local, {"scale": "sqrt", "pool": 2, "pool_first": True}),
    "nonlocal-alexhex7": (non_local, {"pool": 2}),
    "nonlocal-mmcv": (non_local, {"scale": "sqrt"}),
    "nonlocal-timm": (non_local, {"scale": "input"}),
    "multihead": (multihead, {}),
    "additive": (multihead, {"heads": 1, "score": "additive"}),
    "cross": (cross, {}),
    "encoder": (encoder, {}),
    "decoder": (decoder, {}),
    "context-max": (global_context, {"reduce": "max"}),
    "context-mean": (global_context, {"reduce": "mean"}),
    "identity": (identity, {}),
    "conv": (bottleneck, {}),
    "se": (squeeze_excite, {}),
    "gc": (global_context_block, {}),
}
# Options that show in the shapes of the parameters, or in which of them there are.
BUILT_IN = {
    "reduction", "value_reduction", "bias", "spectral_norm", "norm", "expansion", "position_size", "init", "path",
    "parameters",
}  # fmt: skip
