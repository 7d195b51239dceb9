"""Where cells lie, against gradients: a cell is where the pixels are that it is made of."""

import pytest
import timm
import torch
from torch import nn

from sagan_attn import graft, record_attention
from sagan_attn.errors import GraftError
from sagan_attn.viz.cells import Axis, Cells, Places, map_places

STACKS = {
    "stem of ResNet": (nn.Conv2d(3, 1, 7, 2, 3), nn.AvgPool2d(3, 2, 1), nn.Conv2d(1, 1, 3, 2, 1)),
    "patches": (nn.Conv2d(3, 1, 4, 4), nn.Conv2d(1, 1, 7, padding=3), nn.Conv2d(1, 1, 2, 2)),
    "no padding": (nn.Conv2d(3, 1, 5), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, 2)),
    "dilated": (nn.Conv2d(3, 1, 3, 2, 2, dilation=2), nn.Conv2d(1, 1, (3, 5), (1, 3), (1, 2))),
    "same": (nn.Conv2d(3, 1, 3, padding="same"), timm.layers.Conv2dSame(3, 1, 3, stride=2)),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("size", [(65, 95), (64, 96)])
def test_centres_are_those_of_the_pixels_that_count(name, size):
    network = nn.Sequential(*STACKS[name])
    if name == "same":
        network[0] = nn.Conv2d(3, 3, 3, padding="same", groups=3)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1.0 if parameter.dim() == 4 else 0.0)
    image = torch.zeros(1, 3, *size, requires_grad=True)
    with map_places(network) as places:
        out = network(image)
    rows, columns = out.shape[2:]
    cells = places[0].cells((rows, columns))
    i, j = rows // 2, columns // 2  # its window is not cut by the edge
    out[0, 0, i, j].backward()
    grad = image.grad[0].sum(0)
    for side, (weights, edges, k) in enumerate(((grad.sum(1), cells.rows, i), (grad.sum(0), cells.columns, j))):
        centre = float((weights * (torch.arange(len(weights)) + 0.5)).sum() / weights.sum())
        assert (edges[k] + edges[k + 1]) / 2 == pytest.approx(centre, abs=1e-4), side
        assert edges[0] == 0
        assert edges[-1] == size[side]
        assert list(edges) == sorted(edges)


def test_a_residual_network_and_what_is_not_known():
    model = timm.create_model("resnet18").eval()
    with map_places(model) as places, torch.no_grad():
        model(torch.rand(1, 3, 65, 96))
    cells = places[0].cells((5, 6))  # layer3: stride 16, centres on every 16th pixel from the first
    assert cells.rows == (0, 8.5, 24.5, 40.5, 56.5, 65)
    assert cells.columns == (0, 8.5, 24.5, 40.5, 56.5, 72.5, 96)
    assert not cells.even
    assert places[0].cells((4, 4)).even
    assert places[0].cells((4, 4)).rows == (0, 16.25, 32.5, 48.75, 65)  # no map has that size: stretched
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pooled_keys_cover_the_pixels_of_their_window():
    cells = Places(20, 28, ({}, {})).cells((5, 7))
    assert cells.pooled(2, (3, 4)) == Cells((0, 8, 16, 20), (0, 8, 16, 24, 28))
    assert cells.pooled(2, (2, 3)) == Cells((0, 8, 16), (0, 8, 16, 24))  # the edge is left out
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU())
    graft(model, "1", "nonlocal", options={"pool": 2}, example_input=torch.rand(1, 3, 20, 28))
    with map_places(model) as places, record_attention(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 20, 28))
    assert places[0].of(recording.only()) == (cells, cells.pooled(2, (2, 3)))


def test_points_of_the_image():
    cells = Cells((0.0, 8.5, 24.5, 33.0), (0.0, 10.0, 20.0))
    assert [cells.at(x, y) for x, y in ((0, 0), (9.9, 8.4), (10, 8.5), (20, 33), (5, 30))] == [0, 0, 3, 5, 4]
    for point in ((21, 3), (3, -1), (float("nan"), 1)):
        with pytest.raises(GraftError, match="lies outside of the image"):
            cells.at(*point)
    assert cells.centres()[3].tolist() == [16.5, 15.0]
    assert Axis(1.0, 2.0).edges(3, 7) == [0, 2, 4, 7]


def test_sequences_have_no_places():
    module = nn.MultiheadAttention(4, 1)
    with record_attention(module) as recording:
        module(*[torch.rand(3, 1, 4)] * 3)
    with pytest.raises(GraftError, match="a sequence, whose positions have no place"):
        Places(4, 4, ({}, {})).of(recording.only())
    with map_places(module), pytest.raises(GraftError, match=r"images \[B, C, H, W\]"):
        module(*[torch.rand(3, 1, 4)] * 3)
