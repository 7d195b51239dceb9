"""Recorded weights and the picture of them."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from sagan_attn import graft
from sagan_attn.errors import GraftError
from sagan_attn.viz import attention_at, attention_overlay


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()


@pytest.mark.parametrize("per_image", [False, True])
def test_weights_are_those_the_output_was_made_with(per_image):
    model, images = host(), torch.rand(2, 3, 16, 24)
    (graft_,) = graft(model, "1", gate=False, options={"heads": 2, "gamma_init": 1.0}, example_input=images)
    queries = torch.tensor([[0, 5], [23, 7]]) if per_image else torch.tensor([3, 4])
    weights = attention_at(model, graft_, images, queries)
    assert weights.shape == (2, 2, 2, 24)
    # From the formula: the map before the graft, its projections, softmax in float64.
    x = model[:1](images).relu().detach().double()
    block = graft_.block.double()
    for b in range(2):
        for i, query in enumerate(queries[b] if per_image else queries):
            column = x[b, :, query // 6, query % 6]
            q = (block.query.weight[:, :, 0, 0] @ column + block.query.bias).view(2, 1)
            k = torch.einsum("oc,chw->ohw", block.key.weight[:, :, 0, 0], x[b]) + block.key.bias[:, None, None]
            expected = torch.einsum("hd,hdn->hn", q, k.reshape(2, 1, 24)).softmax(dim=1)
            torch.testing.assert_close(weights[b, :, i].double(), expected, rtol=1e-4, atol=1e-6)


def test_recording_leaves_no_trace():
    model, images = host(), torch.rand(1, 3, 16, 16)
    (graft_,) = graft(model, "1", example_input=images)
    before = model(images)
    attention_at(model, graft_, images, torch.tensor([0]))
    assert not graft_.block._forward_pre_hooks
    assert torch.equal(model(images), before)


def test_what_cannot_be_recorded_is_refused():
    model, images = host(), torch.rand(1, 3, 16, 16)
    grafts = graft(model, {"0": "context-max", "1": "sagan"}, example_input=images)
    with pytest.raises(GraftError, match="GlobalContext2d: no attention weights"):
        attention_at(model, grafts[0], images, torch.tensor([0]))
    with grafts.disabled(), pytest.raises(GraftError, match="did not run"):
        attention_at(model, grafts[1], images, torch.tensor([0]))


def test_the_picture_shows_the_query_and_the_cell_it_looks_at():
    """One white cell of a 3 x 6 map over a black 30 x 60 image: found again where its pixels are."""
    weight = torch.zeros(3, 6)
    weight[2, 4] = 1.0
    figure = attention_overlay([torch.zeros(3, 30, 60, dtype=torch.uint8)], [weight], [(0, 1)], title="one")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    axis = figure.axes[1]
    height = pixels.shape[0]

    def at(x, y):
        column, row = axis.transData.transform((x, y))
        return pixels[int(height - row), int(column)]

    bright = at(45, 25)
    assert bright.sum() > 2 * at(35, 25).sum()
    assert bright.sum() > 2 * at(45, 15).sum()
    assert np.allclose(bright, at(41, 21), atol=3)
    assert np.allclose(bright, at(49, 29), atol=3)
    (x,), (y,) = axis.lines[0].get_data()
    assert (x, y) == (15.0, 5.0)  # the middle of cell (0, 1), whose pixels are 10 to 20 and 0 to 10
    assert figure.get_suptitle() == "one"
    assert figure.axes[-1].get_ylabel() == "attention weight"
