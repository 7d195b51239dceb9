"""Some images, and all that the attention of a model does on them: what sheets, summaries and pages are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery import head_importance
from sagan_attn.surgery.heads import attentions
from sagan_attn.surgery.probe import quiet
from sagan_attn.viz.cells import RIM, Cells, Places, map_places
from sagan_attn.viz.head_figures import HeadFigures, head_statistics
from sagan_attn.viz.record import MAX_BYTES, AttentionRecord, record_attention
from sagan_attn.viz.targets import At

__all__ = ["Look", "look"]


@dataclass(frozen=True)
class Look:
    """What was seen.

    Args:
        images: as the model saw them, uint8 [B, 3, H, W].
        captions: a line for each of them.
        records: path of each attention -> the weights of all its queries on these images.
        places: where maps lie in the images.
        importance: path of an attention -> importance of its heads [h], where it is known.
        left_out: how many more images were asked for and not looked at.
    """

    images: Tensor
    captions: Sequence[str]
    records: Mapping[str, AttentionRecord]
    places: Places
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    left_out: int = 0

    def cells(self, path: str) -> tuple[Cells, Cells]:
        """The cells of the queries and of the keys of an attention."""
        return self.places.of(self.records[path])

    @property
    def rim(self) -> str:
        """Why cells at the rim have another size; "" where they are all alike."""
        return "" if all(cells.even for path in self.records for cells in self.cells(path)) else RIM

    @property
    def images_words(self) -> str:
        """ "1 image", "8 of 11 images"."""
        seen, total = len(self.images), len(self.images) + self.left_out
        return f"{seen} of {total} images" if self.left_out else f"{seen} image{'s' * (seen != 1)}"

    def figures(self, path: str) -> list[HeadFigures]:
        """Of each head of an attention."""
        return head_statistics(self.records[path], self.places, self.importance.get(path))


def look(
    model: nn.Module,
    inputs: Tensor,
    images: Tensor,
    captions: Sequence[str],
    *,
    at: At = None,
    labels: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> Look:
    """Run the model once on some images, in eval mode and without gradients, and keep the weights of every query.

    Args:
        inputs: what the model takes, [B, C, H, W].
        images: the same as pictures, uint8 [B, 3, H, W].
        captions: a line for each image.
        at, max_bytes: see `record_attention`.
        labels: classes [B]; with them, heads of grafts get their importance for the cross-entropy.

    Raises:
        GraftError: see `record_attention`; an attention that did not run once, or attends to no map.
    """
    with record_attention(model, at=at, max_bytes=max_bytes) as recording, map_places(model) as places, quiet(model):
        model(inputs)
    records = {path: recording.only(path) for path in recording}
    for record in records.values():
        if len(record.weights) != len(inputs):
            raise GraftError(f"{record.path!r} got {len(record.weights)} maps for {len(inputs)} images")
        places[0].of(record)
    importance: Mapping[str, Tensor] = {}
    if labels is not None and attentions(model).keys() & records.keys():
        importance = head_importance(model, [(inputs, labels)])
    return Look(images.cpu(), list(captions), records, places[0], importance)
