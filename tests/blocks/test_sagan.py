"""The sagan form against the formula, written once more with einsum in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn import SelfAttention2d
from sagan_attn.errors import BlockError


def pooled(x: Tensor, size: int) -> Tensor:
    """Max over windows of size x size, the last ones cut off by the edge."""
    rows = [x[:, :, i : i + size] for i in range(0, x.shape[2], size)]
    return torch.stack(
        [
            torch.stack([row[..., j : j + size].amax(dim=(2, 3)) for j in range(0, x.shape[3], size)], dim=-1)
            for row in rows
        ],
        dim=2,
    )


def reference(block: SelfAttention2d, x: Tensor, scale: float, pool: int, heads: int) -> tuple[Tensor, Tensor]:
    """Output and weights, head after head, from the block's parameters alone."""
    parameters = dict(block.named_parameters())

    def conv(name: str, x: Tensor) -> Tensor:
        y = torch.einsum("bchw,oc->bohw", x, parameters[f"{name}.weight"][:, :, 0, 0])
        return y + parameters[f"{name}.bias"][:, None, None] if f"{name}.bias" in parameters else y

    query = conv("query", x).flatten(2)
    key, value = (pooled(conv(name, x), pool).flatten(2) for name in ("key", "value"))
    outputs, weights = [], []
    for q, k, v in zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True):
        scores = scale * torch.einsum("bdi,bdj->bij", q, k)
        exp = (scores - scores.amax(dim=2, keepdim=True)).exp()
        weights.append(exp / exp.sum(dim=2, keepdim=True))
        outputs.append(torch.einsum("bij,bdj->bdi", weights[-1], v))
    branch = torch.cat(outputs, 1).unflatten(2, x.shape[2:])
    if "output.weight" in parameters:
        branch = conv("output", branch)
    return parameters["gamma"] * branch + x, torch.stack(weights, 1)


OPTIONS = [
    ({}, 1.0),
    ({"heads": 2}, 1.0),
    ({"heads": 4}, 1.0),
    ({"pool": 2}, 1.0),
    ({"pool": 3, "heads": 2}, 1.0),
    ({"value_reduction": 2, "heads": 2}, 1.0),
    ({"value_reduction": 10, "pool": 2}, 1.0),
    ({"scale": 0.3}, 0.3),
    ({"scale": "sqrt"}, 4**-0.5),
    ({"scale": "sqrt", "heads": 2}, 2**-0.5),
    ({"bias": False}, 1.0),
    ({"reduction": 2}, 1.0),
    ({"reduction": 2, "scale": "sqrt"}, 16**-0.5),
]


@pytest.mark.parametrize(("options", "scale"), OPTIONS, ids=lambda v: str(v))
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_numbers_and_gradients(options: dict, scale: float, size: tuple[int, int]):
    block = SelfAttention2d(32, **options, gamma_init=0.8).double()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    expected, weights = reference(block, x, scale, options.get("pool", 1), options.get("heads", 1))
    output = block(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(block.attention_weights(x), weights)
    assert block.attention_shape(*size) == tuple(weights.shape[1:])

    towards = torch.randn_like(output)
    wanted = [x, *block.parameters()]
    ours = torch.autograd.grad(output, wanted, towards)
    theirs = torch.autograd.grad(expected, wanted, towards)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)

    single = block.float()(x.detach().float())
    torch.testing.assert_close(single, expected.detach().float(), rtol=1e-5, atol=1e-5)


def test_pooling_of_even_maps_is_that_of_the_public_codes():
    block = SelfAttention2d(8, pool=2, gamma_init=1.0).double()
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    key, value = (F.max_pool2d(F.conv2d(x, c.weight, c.bias), 2).flatten(2) for c in (block.key, block.value))
    query = F.conv2d(x, block.query.weight, block.query.bias).flatten(2)
    beta = F.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
    torch.testing.assert_close(block(x), x + torch.bmm(value, beta.transpose(1, 2)).view_as(x))


@pytest.mark.parametrize("pool", [2, 3])
def test_pooling_of_odd_maps_loses_no_position(pool: int):
    block = SelfAttention2d(4, pool=pool, gamma_init=1.0).double()
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    for position in [(0, 0), (4, 6), (4, 0), (2, 6), (3, 5)]:
        changed = x.clone()
        changed[:, :, position[0], position[1]] += 50 * block.value.weight[0, :, 0, 0].detach().sign()
        difference = (block(changed) - block(x))[:, 0]
        assert difference.abs().min() > 0, position


def test_state_dict():
    block = SelfAttention2d(16)
    assert {key: list(value.shape) for key, value in block.state_dict().items()} == {
        "gamma": [1],
        "query.weight": [2, 16, 1, 1],
        "query.bias": [2],
        "key.weight": [2, 16, 1, 1],
        "key.bias": [2],
        "value.weight": [16, 16, 1, 1],
        "value.bias": [16],
    }
    assert block.gamma.tolist() == [0.0]
    assert list(SelfAttention2d(3).query.weight.shape) == [1, 3, 1, 1]
    assert "query.bias" not in SelfAttention2d(8, bias=False).state_dict()
    assert list(SelfAttention2d(16, value_reduction=3).output.weight.shape) == [16, 5, 1, 1]


def test_first_weights_are_those_of_torch_convolutions():
    torch.manual_seed(4)
    block = SelfAttention2d(16)
    torch.manual_seed(4)
    for name, out in (("query", 2), ("key", 2), ("value", 16)):
        conv = nn.Conv2d(16, out, 1)
        assert torch.equal(block.get_parameter(f"{name}.weight"), conv.weight)
        assert torch.equal(block.get_parameter(f"{name}.bias"), conv.bias)


def test_on_the_first_step_only_gamma_moves():
    block = SelfAttention2d(16, value_reduction=2)
    block(torch.randn(2, 16, 5, 5)).square().sum().backward()
    for name, parameter in block.named_parameters():
        zero = parameter.grad.count_nonzero() == 0
        assert zero == (name != "gamma"), name


def test_key_bias_has_no_effect_and_value_bias_passes_through():
    block = SelfAttention2d(16, heads=2, gamma_init=0.5).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    before = block(x).detach()
    with torch.no_grad():
        block.key.bias += torch.randn(2).double() * 5
        torch.testing.assert_close(block(x), before)
        step = torch.randn(16).double()
        block.value.bias += step
        torch.testing.assert_close(block(x), before + 0.5 * step[:, None, None])
        block.query.bias += 1.0
        assert (block(x) - before - 0.5 * step[:, None, None]).abs().max() > 1e-4


def test_weights_of_chosen_queries():
    block = SelfAttention2d(16, heads=2, pool=2)
    x = torch.randn(3, 16, 5, 4)
    every = block.attention_weights(x)
    assert every.shape == (3, 2, 20, 6)
    torch.testing.assert_close(every.sum(-1), torch.ones(3, 2, 20))
    chosen = torch.tensor([19, 0, 7])
    torch.testing.assert_close(block.attention_weights(x, queries=chosen), every[:, :, chosen])
    own = torch.tensor([[1, 2], [3, 3], [19, 0]])
    expected = torch.stack([every[b][:, own[b]] for b in range(3)])
    torch.testing.assert_close(block.attention_weights(x, queries=own), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, r"in_channels \(0\) must be a whole number of at least 1"),
        ({"heads": 0}, r"heads \(0\) must be a whole number of at least 1"),
        ({"heads": True}, r"heads \(True\) must be a whole number"),
        ({"heads": 3}, r"heads \(3\) must divide the query channels, in_channels // reduction \(4\)"),
        ({"in_channels": 9, "reduction": 2, "heads": 4}, r"heads \(4\) must divide the value channels \(9\)"),
        ({"reduction": 33}, r"reduction \(33\) leaves 0 channels of in_channels \(32\)"),
        ({"reduction": 0.5}, r"reduction \(0.5\) must be a whole number"),
        ({"pool": -1}, r"pool \(-1\) must be a whole number"),
        ({"value_reduction": 0}, r"value_reduction \(0\) must be a whole number"),
        ({"value_reduction": 32, "heads": 2}, r"heads \(2\) must divide the value channels \(1\)"),
        ({"value_reduction": 40}, r"value_reduction \(40\) leaves 0 channels of in_channels \(32\)"),
        ({"scale": "root"}, r"scale \('root'\) must be a number, 'sqrt' or None"),
        ({"scale": True}, r"scale \(True\) must be a number"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(BlockError, match=message):
        SelfAttention2d(**{"in_channels": 32, **options})


def test_inputs_that_do_not_fit():
    block = SelfAttention2d(8)
    message = r"input of shape \(1, 4, 3, 3\) does not fit: a map \[B, 8, H, W\] is required"
    with pytest.raises(BlockError, match=message):
        block(torch.randn(1, 4, 3, 3))
    with pytest.raises(BlockError, match=r"shape \(8, 3, 3\) does not fit"):
        block(torch.randn(8, 3, 3))
