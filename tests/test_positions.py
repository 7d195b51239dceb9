"""Positions: tables of offsets, their resizing, sinusoids, and blocks that know where things are."""

from itertools import product

import pytest
import torch
from references import fill, offset_vector, parameters_of, reference
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from sagan_attn import functional
from sagan_attn.blocks import CrossAttention2d, MultiHeadAttention2d, create_block
from sagan_attn.errors import BlockError
from sagan_attn.functional.positions import relative_logits, sinusoids


def tables(height_rel: Tensor, width_rel: Tensor, height: int, width: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return functional.relative_tables(height_rel, width_rel, torch.empty(1, 1, height, width), scale)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_their_own_size_tables_are_left_as_they_are(dtype: torch.dtype):
    for size in range(1, 65):
        table = torch.randn(2 * size - 1, 3, dtype=dtype)
        for one in tables(table, table, size, size):
            assert torch.equal(one, table), size
            assert one.dtype == dtype


def test_resized_by_hand():
    two, three = column(0, 10, 40), column(0, 1, 4, 9, 16)  # made for sides of 2 and 3
    assert tables(two, three, 3, 2)[0].tolist() == column(0, 5, 10, 25, 40).tolist()
    assert tables(two, three, 3, 2)[1].tolist() == column(0, 4, 16).tolist()
    assert tables(two, three, 1, 1)[0].tolist() == column(10).tolist()
    assert tables(two, three, 1, 1)[1].tolist() == column(4).tolist()
    assert tables(two, three, 5, 5)[1].tolist() == column(0, 0.5, 1, 2.5, 4, 6.5, 9, 12.5, 16).tolist()
    assert tables(two, three, 3, 2, scale=0.5)[0].tolist() == column(0, 2.5, 5, 12.5, 20).tolist()
    of_one = column(7)
    assert tables(of_one, of_one, 1, 3)[1].tolist() == column(7, 7, 7, 7, 7).tolist()


@pytest.mark.parametrize("made", [1, 2, 5, 7, 14, 32])
def test_resized_in_between(made: int):
    table = torch.randn(2 * made - 1, 4, dtype=torch.float64)
    for size in (1, 2, 3, 6, 7, 14, 33, 56):
        resized, _ = tables(table, table, size, 3)
        assert resized.shape == (2 * size - 1, 4)
        expected = torch.stack([offset_vector(table, offset, size) for offset in range(1 - size, size)])
        torch.testing.assert_close(resized, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(resized[size - 1], table[made - 1])  # the same place
        if size > 1:
            torch.testing.assert_close(resized[[0, -1]], table[[0, -1]], rtol=1e-12, atol=1e-12)
        single, _ = tables(table.float(), table.float(), size, 3)
        torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)


def test_resizing_has_gradients():
    table = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    for size in (1, 2, 3, 7):
        assert torch.autograd.gradcheck(lambda t, size=size: tables(t, t, size, size + 1), table)


@pytest.mark.parametrize(("height", "width"), [(0, 3), (3, 0), (0, 0)])
def test_sides_of_0(height: int, width: int):
    one, other = tables(torch.randn(5, 2), torch.randn(7, 2), height, width)
    assert (len(one), len(other)) == (max(0, 2 * height - 1), max(0, 2 * width - 1))
    assert relative_logits(torch.randn(2, 3, 0, 2), one, other).shape == (2, 3, 0, 0)
    for name, position in product(("multihead", "botnet"), ("relative", "relative_scaled", "sinusoidal")):
        block = fill(create_block(name, 8, position=position))
        x = torch.randn(2, 8, height, width, requires_grad=True)
        output = block(x)
        assert output.shape == x.shape
        output.sum().backward()
        assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (1, 5), (5, 1), (1, 1)])
def test_relative_logits_are_a_sum_over_rows_and_columns(height: int, width: int):
    n = height * width
    query = torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True)
    height_rel, width_rel = (
        torch.randn(2 * s - 1, 4, dtype=torch.float64, requires_grad=True) for s in (height, width)
    )
    expected = torch.empty(2, 3, n, n, dtype=torch.float64)
    pairs = list(product(range(height), range(width)))
    for (iq, jq), (ik, jk) in product(pairs, pairs):
        vector = height_rel[ik - iq + height - 1] + width_rel[jk - jq + width - 1]
        expected[:, :, iq * width + jq, ik * width + jk] = (query[:, :, iq * width + jq] * vector).sum(-1)
    logits = relative_logits(query, height_rel, width_rel)
    torch.testing.assert_close(logits, expected)
    wanted, towards = (query, height_rel, width_rel), torch.randn_like(logits)
    for one, other in zip(
        torch.autograd.grad(logits, wanted, towards), torch.autograd.grad(expected, wanted, towards), strict=True
    ):
        torch.testing.assert_close(one, other)

    chosen = torch.randint(n, (5,))
    torch.testing.assert_close(
        relative_logits(query[:, :, chosen], height_rel, width_rel, chosen), expected[:, :, chosen]
    )
    own = torch.randint(n, (2, 5))
    picked = query.take_along_dim(own[:, None, :, None], dim=2)
    torch.testing.assert_close(
        relative_logits(picked, height_rel, width_rel, own), expected.take_along_dim(own[:, None, :, None], dim=2)
    )


@pytest.mark.parametrize("position", ["relative", "relative_scaled", "sinusoidal"])
def test_weights_of_chosen_queries(position: str):
    size = {} if position == "sinusoidal" else {"position_size": (3, 4)}
    block = fill(create_block("multihead", 8, heads=2, position=position, **size))
    x = torch.randn(3, 8, 5, 4)
    every = block.attention_weights(x)
    chosen, own = torch.tensor([19, 0, 7]), torch.tensor([[1, 2], [3, 3], [19, 0]])
    torch.testing.assert_close(block.attention_weights(x, chosen), every[:, :, chosen])
    torch.testing.assert_close(block.attention_weights(x, own), torch.stack([every[b][:, own[b]] for b in range(3)]))


@pytest.mark.parametrize(("channels", "height", "width"), [(4, 3, 5), (16, 7, 7), (64, 14, 9), (8, 1, 1), (256, 2, 40)])
def test_sinusoids_are_those_of_timm(channels: int, height: int, width: int):
    ours = sinusoids(channels, height, width, like=torch.empty(0))
    assert ours.dtype == torch.float32
    theirs = build_sincos2d_pos_embed([height, width], dim=channels)
    torch.testing.assert_close(ours.flatten(1).T, theirs, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, channels, height, width)
    torch.testing.assert_close(functional.add_sinusoids(x), x + ours)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert functional.add_sinusoids(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinusoids(channels, height, width, like=x), ours)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (1, 1), (3, 5), (5, 3), (1, 9)])
@pytest.mark.parametrize("position", ["relative", "relative_scaled"])
def test_maps_of_other_sizes(position: str, size: tuple[int, int]):
    options = {"position": position, "position_size": 7, "heads": 2}
    block = fill(create_block("multihead", 8, **options))
    assert block.height_rel.shape == block.width_rel.shape == (13, 4)
    x = torch.randn(2, 8, *size)
    wide = {key: value.double() for key, value in parameters_of(block).items()}
    expected = reference("multihead", options, wide, x.double())
    torch.testing.assert_close(block(x), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sagan", "multihead", "botnet", "encoder", "decoder"])
@pytest.mark.parametrize("position", [None, "relative", "relative_scaled", "sinusoidal"])
def test_what_a_permutation_of_positions_does(name: str, position: str | None):
    """Without positions attention commutes with any permutation; with them it does not."""
    block = fill(create_block(name, 16, position=position).double())
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    order = torch.randperm(20)

    def permuted(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    difference = (block(permuted(x)) - permuted(block(x))).abs().max().item()
    assert (difference < 1e-9) == (position is None), difference
    assert position is None or difference > 1e-4


def test_relative_positions_know_differences_alone():
    """A map that is the same everywhere but for its border: moving what is far from the border moves the scores."""
    height_rel, width_rel = torch.randn(9, 4), torch.randn(9, 4)
    logits = relative_logits(torch.ones(1, 1, 25, 4), height_rel, width_rel).view(5, 5, 5, 5)
    torch.testing.assert_close(logits[1, 1, 2:4, :3], logits[2, 2, 3:5, 1:4])
    turned = relative_logits(torch.ones(1, 1, 25, 4), width_rel, height_rel).view(5, 5, 5, 5)
    torch.testing.assert_close(turned, logits.permute(1, 0, 3, 2))


@pytest.mark.parametrize("context_size", [(2, 8), (8, 2), (3, 8), (1, 1)])
def test_relative_positions_need_a_context_of_the_size_of_the_map(context_size: tuple[int, int]):
    """Also one with as many positions in another shape, for which the offsets would be wrong without a sign of it."""
    block = CrossAttention2d(8, heads=2, position="relative")
    with pytest.raises(BlockError, match="context"):
        block(torch.randn(2, 8, 4, 4), torch.randn(2, 8, *context_size))


@pytest.mark.parametrize("channels", [(6, 8), (8, 6)])
def test_sinusoids_need_channels_in_fours(channels: tuple[int, int]):
    with pytest.raises(BlockError, match=r"position \('sinusoidal'\) needs channels in fours, not 6"):
        CrossAttention2d(*channels, heads=2, position="sinusoidal")


def test_a_size_without_a_table():
    with pytest.raises(BlockError, match=r"position_size \(7\) goes with relative positions, not with 'sinusoidal'"):
        MultiHeadAttention2d(8, position="sinusoidal", position_size=7)


@pytest.mark.parametrize("queries", [[20], [-1], [[0, 20], [1, 2], [3, 4]], [1.0], [[0, 1]], [[[0]]]])
def test_positions_outside_of_the_map(queries):
    with pytest.raises(BlockError, match="queries"):
        create_block("sagan", 8).attention_weights(torch.randn(3, 8, 5, 4), torch.tensor(queries))


@pytest.mark.parametrize("size", [0, (0, 3), (3, 0), (3,), (1, 2, 3), 7.5, (2.5, 3), "14"])
def test_sizes_out_of_range(size):
    with pytest.raises(BlockError, match="position_size"):
        MultiHeadAttention2d(8, position="relative", position_size=size)
