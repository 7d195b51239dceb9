"""One HTML page with the attention of some images in it: point at a place and see what it looks at. It fetches nothing.

Weights are kept as a byte each, with the least (or 0, if that is less) and the largest of a row beside them, so a
weight is shown at most 1 / 510 of that range from what it is.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sagan_attn.errors import GraftError
from sagan_attn.viz.draw import MAP
from sagan_attn.viz.explorer_parts import BODY, SCRIPT, STYLE
from sagan_attn.viz.head_figures import COLUMNS, HeadFigures, label
from sagan_attn.viz.look import Look
from sagan_attn.viz.page import data_url, page, text

__all__ = ["explorer_page", "quantised"]

MAX_BYTES = 5_000_000
SHOWN = ("head", "entropy", "entropy_share", "self_weight", "distance", "query_independence", "agreement", "importance")


def explorer_page(seen: Look, title: str, max_bytes: int = MAX_BYTES) -> str:
    """The page as text, for every image, site, head and query of `seen`.

    Raises:
        GraftError: the page would take more than max_bytes, with how many; asked before it is made.
    """
    needed = sum(-(-record.weights.numel() * 4 // 3) for record in seen.records.values())
    if needed > max_bytes:
        sizes = "; ".join(f"{path} {list(record.weights.shape)}" for path, record in seen.records.items())
        raise GraftError(
            f"the weights alone ({sizes}: images, heads, queries, keys) would make a page of {needed:,} bytes, and "
            f"{int(max_bytes):,} are allowed: take fewer images or sites, or allow more"
        )
    content = {
        "size": seen.places.image_size,
        "colours": _colours(),
        "images": [
            {"caption": caption, "src": data_url("image/png", _png(image))}
            for caption, image in zip(seen.captions, seen.images, strict=True)
        ],
        "sites": [_site(seen, path) for path in seen.records],
    }
    words = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    body = [
        f"<h1>{text(title)}</h1>",
        f'<p class="dim">{text(seen.images_words)}. {text(seen.rim)}</p>',
        BODY,
        f'<script type="application/json" id="data">{words}</script>',
    ]
    made = page(title, body, STYLE, SCRIPT)
    if len(made.encode()) > max_bytes:
        raise GraftError(
            f"the page would take {len(made.encode()):,} bytes, and {int(max_bytes):,} are allowed: take fewer images "
            "or sites, or allow more"
        )
    return made


def quantised(weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights [..., M] as bytes, uint8 of the same shape, and least and largest of each row, float32 [..., 2].

    A weight is least + byte * (largest - least) / 255, to half a step; the least is 0 where no weight is below it.
    """
    values = weights.detach().double().cpu().numpy()
    low = np.minimum(values.min(-1, keepdims=True), 0).astype(np.float32)
    high = values.max(-1, keepdims=True).astype(np.float32)
    span = (high - low).astype(np.float64)
    steps = np.rint((values - low) / np.where(span > 0, span, 1) * 255).clip(0, 255).astype(np.uint8)
    return steps, np.concatenate([low, high], axis=-1)


def _site(seen: Look, path: str) -> dict[str, Any]:
    record = seen.records[path]
    steps, limits = quantised(record.weights)
    of_queries, of_keys = seen.cells(path)
    several = sum(other.site == record.site for other in seen.records.values()) > 1
    return {
        "name": path if several else record.site,
        "heads": record.weights.shape[1],
        "query": {"rows": of_queries.rows, "columns": of_queries.columns},
        "key": {"rows": of_keys.rows, "columns": of_keys.columns},
        "weights": base64.b64encode(np.ascontiguousarray(steps).tobytes()).decode(),
        "range": base64.b64encode(np.ascontiguousarray(limits.astype("<f4")).tobytes()).decode(),
        "columns": [(label(name), COLUMNS[name]) for name in SHOWN],
        "figures": _table(seen.figures(path)),
    }


def _table(figures: Sequence[HeadFigures]) -> list[list[str]]:
    def word(value: Any) -> str:
        return str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{value:.3g}"

    return [[word(getattr(one, name)) for name in SHOWN] for one in figures]


def _png(image: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(out, format="png")
    return out.getvalue()


def _colours() -> str:
    """256 colours of three bytes each."""
    import matplotlib as mpl

    table = mpl.colormaps[MAP](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(np.ascontiguousarray(table).tobytes()).decode()
