"""What the heads of recorded attention do, in numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sagan_attn.files import no_formula
from sagan_attn.viz.cells import Places
from sagan_attn.viz.record import AttentionRecord

__all__ = ["COLUMNS", "HeadFigures", "agreement", "as_json", "csv_of", "head_statistics", "label"]

# column -> its meaning
COLUMNS = {
    "site": "where the graft is",
    "path": "of the attention in the model",
    "head": "counted from 0",
    "images": "that were looked at",
    "queries": "of each image",
    "keys": "of each image",
    "entropy": "of a query's weights, nats, mean over queries and images",
    "entropy_share": "of ln(keys): 1 is even weight, 0 all weight on one key",
    "self_weight": "that a query gives to the key which covers it",
    "distance": "from query to key, pixels, mean by weight",
    "distance_even": "the same for even weight",
    "query_independence": "1 - total variation between the weights of two queries of an image, mean over pairs: at 1 "
    "all queries look at the same place",
    "query_cosine": "cosine between the weights of two queries of an image, mean over pairs",
    "agreement": "1 - total variation between the weights of this head and of another, mean over the others",
    "importance": "|dL/d head|, l2-normed over the heads (see head_importance)",
}
UNITS = {"entropy": "nats", "distance": "pixels", "distance_even": "pixels"}


@dataclass(frozen=True)
class HeadFigures:
    """One head of one attention; see `COLUMNS`. NaN where a figure has no meaning."""

    site: str
    path: str
    head: int
    images: int
    queries: int
    keys: int
    entropy: float
    entropy_share: float
    self_weight: float
    distance: float
    distance_even: float
    query_independence: float
    query_cosine: float
    agreement: float
    importance: float = math.nan


def head_statistics(
    record: AttentionRecord, places: Places | None = None, importance: Tensor | None = None
) -> list[HeadFigures]:
    """Figures of each head, means over images and the queries that were recorded.

    places: for distances, which are NaN without. importance: of the heads [h], from `head_importance`. Entropies,
    distances and agreements are NaN for weights that are no shares, as those of a mean of scores. With one key alone
    there is no entropy share, with one query no independence, with one head no agreement.

    Source of the question whether all queries look at the same place: Cao et al., GCNet, 2019 (arXiv:1904.11492).
    """
    w = record.weights.detach().double()
    batch, heads, queries, keys = w.shape
    shares = bool((w >= 0).all()) and bool(((w.sum(-1) - 1).abs() < 1e-3).all())
    nothing = w.new_full((heads,), math.nan)
    entropy = torch.special.entr(w).sum(-1).mean((0, 2)) if shares else nothing
    distance = even = nothing
    if shares and places is not None and record.key_size is not None:
        between = _distances(record, places).to(w)  # [B or 1, Q, M]
        distance = (w * between[:, None]).sum(-1).mean((0, 2))
        even = between.mean().expand(heads)
    others = agreement(record)
    columns = {
        "entropy": entropy,
        "entropy_share": entropy / math.log(keys) if keys > 1 else nothing,
        "self_weight": _self_weight(record, w),
        "distance": distance,
        "distance_even": even,
        "query_independence": 1 - _variation(w) if shares and queries > 1 else nothing,
        "query_cosine": _cosine(w) if queries > 1 else nothing,
        "agreement": (others.sum(1) - others.diagonal()) / (heads - 1) if heads > 1 else nothing,
        "importance": nothing if importance is None else importance,
    }
    return [
        HeadFigures(
            record.site,
            record.path,
            head,
            batch,
            queries,
            keys,
            **{name: float(values[head]) for name, values in columns.items()},
        )
        for head in range(heads)
    ]


def agreement(record: AttentionRecord) -> Tensor:
    """1 - total variation between the weights of two heads, mean over images and queries, [h, h] in float64."""
    w = record.weights.detach().double()
    if not (bool((w >= 0).all()) and bool(((w.sum(-1) - 1).abs() < 1e-3).all())):
        return w.new_full((w.shape[1], w.shape[1]), math.nan)
    rows = [1 - (w - w[:, head : head + 1]).abs().sum(-1).mean((0, 2)) / 2 for head in range(w.shape[1])]
    return torch.stack(rows)


def csv_of(figures: Sequence[HeadFigures]) -> str:
    """The figures as CSV, a line a head; what has no meaning is empty."""
    lines = [",".join(COLUMNS)]
    for one in figures:
        values = [asdict(one)[name] for name in COLUMNS]
        lines.append(",".join(_cell(value) for value in values))
    return "\n".join(lines) + "\n"


def as_json(figures: Sequence[HeadFigures]) -> list[Mapping[str, object]]:
    """The figures as JSON can hold them: null for what has no meaning."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(one).items()}
        for one in figures
    ]


def label(name: str) -> str:
    """A column in words, with its unit."""
    return name.replace("_", " ") + (f" ({UNITS[name]})" if name in UNITS else "")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    text = str(no_formula(value))
    return '"' + text.replace('"', '""') + '"' if any(letter in text for letter in ',"\n') else text


def _distances(record: AttentionRecord, places: Places) -> Tensor:
    """Pixels between the centres of queries and keys, [B or 1, Q, M]."""
    of_queries, of_keys = places.of(record)
    queries = record.queries.cpu()
    chosen = of_queries.centres()[queries if queries.dim() == 2 else queries[None]]  # [B or 1, Q, 2]
    return torch.cdist(chosen, of_keys.centres())


def _self_weight(record: AttentionRecord, w: Tensor) -> Tensor:
    """Weight that queries give to the keys which cover them, [h]; NaN where keys are of another map."""
    if record.query_size is None or record.key_size is None:
        return w.new_full((w.shape[1],), math.nan)
    (_, width), (rows, columns), pool = record.query_size, record.key_size, record.pool
    if any(side // pool > keys or keys * pool >= side + pool for side, keys in zip(record.query_size, record.key_size)):  # noqa: B905
        return w.new_full((w.shape[1],), math.nan)
    row, column = record.queries // width // pool, record.queries % width // pool
    inside = ((row < rows) & (column < columns)).expand(len(w), -1)  # of no key: an edge that pooling leaves out
    index = (row * columns + column).clamp(max=w.shape[3] - 1).expand(len(w), -1)
    own = w.take_along_dim(index[:, None, :, None], dim=3)[..., 0]  # [B, h, Q]
    return own.masked_fill(~inside[:, None], math.nan).nanmean((0, 2))


def _variation(w: Tensor) -> Tensor:
    """Total variation between the rows of two queries, mean over the pairs of an image and over images, [h].

    Of n sorted numbers a_0 <= a_1 ..., the sum of |a_i - a_j| over pairs is the sum of (2k - n + 1) a_k.
    """
    n = w.shape[2]
    factors = (2 * torch.arange(n, device=w.device) - n + 1).to(w.dtype)
    sums = (w.sort(dim=2).values * factors[:, None]).sum((2, 3))  # [B, h]
    return (sums / (n * (n - 1))).mean(0)


def _cosine(w: Tensor) -> Tensor:
    """Cosine between the rows of two queries, mean over the pairs of an image and over images, [h]."""
    n = w.shape[2]
    units = torch.nn.functional.normalize(w, dim=3)
    both = units.sum(2).square().sum(-1) - units.square().sum((2, 3))  # [B, h]
    return (both / (n * (n - 1))).mean(0)
