"""functional.py against numbers worked out by hand and plain einsum."""

import pytest
import torch
import torch.nn.functional as F

from sagan_attn import functional
from sagan_attn.errors import BlockError


def test_worked_example():
    x = torch.tensor([[1, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], dtype=torch.float64)
    w_k = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.float64)
    w_q = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    w_v = torch.tensor([[0, 2, 0], [0, 3, 0], [1, 0, 3], [1, 1, 0]], dtype=torch.float64)
    q, k, v = ((x @ w)[None, None] for w in (w_q, w_k, w_v))
    scores = torch.tensor([[2, 4, 4], [4, 16, 12], [4, 12, 10]], dtype=torch.float64)
    expected = [[1.936621, 6.683105, 1.595068], [1.999994, 7.963991, 0.053976], [1.999704, 7.759892, 0.358389]]
    weights = functional.attention_weights(q, k)[0, 0]
    torch.testing.assert_close(weights, scores.exp() / scores.exp().sum(dim=1, keepdim=True))
    output = functional.attend(q, k, v)[0, 0]
    torch.testing.assert_close(output, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(functional.attention_output(weights[None, None], v)[0, 0], output)


def test_attend_agrees_with_torch():
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(functional.attend(q, k, v, 0.3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_float16(dtype: torch.dtype):
    q = torch.full((1, 1, 2, 4), 200.0, dtype=dtype)
    k = torch.stack([q[0, 0, 0], q[0, 0, 0] / 2])[None, None]  # scores 160,000 and 80,000
    weights = functional.attention_weights(q, k)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[[[1.0, 0.0], [1.0, 0.0]]]]
    with torch.autocast("cpu", dtype):
        assert torch.equal(functional.attention_weights(q.float(), k.float()), weights)
        assert torch.equal(functional.attention_weights(q, k), weights)
    output = functional.attend(q, k, torch.eye(2, dtype=dtype)[None, None])
    assert output.dtype == dtype
    assert output.tolist() == [[[[1.0, 0.0], [1.0, 0.0]]]]


def test_heads_split_and_merge():
    x = torch.arange(2 * 6 * 2 * 3.0).reshape(2, 6, 2, 3)
    rows = functional.split_heads(x, 2)
    assert rows.shape == (2, 2, 6, 3)
    assert rows[1, 1, 4].tolist() == x[1, 3:, 1, 1].tolist()
    assert rows.data_ptr() == x.data_ptr()
    assert torch.equal(functional.merge_heads(rows, like=x), x)


def test_pooling_by_hand():
    x = torch.tensor([[[[1.0, 2, 9], [3, 4, 8], [5, 6, 7]]]])
    assert functional.pool_map(x, 2).tolist() == [[[[4, 9], [6, 7]]]]
    assert functional.pool_map(x, 5).tolist() == [[[[9]]]]
    assert functional.pool_map(x, 1) is x
    assert functional.pool_map(x[:, :, :0], 2).shape == (1, 1, 0, 3)


STRIDED = {
    "contiguous": torch.randn(2, 4, 3, 5),
    "channels_last": torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
    "NHWC permuted": torch.randn(2, 3, 5, 4).permute(0, 3, 1, 2),
    "1xW channels_last": torch.randn(2, 4, 1, 5).to(memory_format=torch.channels_last),
    "1xW permuted": torch.randn(2, 1, 5, 4).permute(0, 3, 1, 2),
    "1x1 channels_last": torch.randn(2, 4, 1, 1).to(memory_format=torch.channels_last),
    "one channel": torch.randn(2, 3, 5, 1).permute(0, 3, 1, 2),
    "batch of 1": torch.randn(1, 3, 5, 4).permute(0, 3, 1, 2),
    "transposed": torch.randn(2, 4, 5, 3).transpose(2, 3),
    "CNHW": torch.randn(4, 2, 3, 5).transpose(0, 1),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gated_residual_keeps_dtype_and_strides(layout: str, dtype: torch.dtype):
    x = STRIDED[layout].to(dtype)
    assert x.stride() == STRIDED[layout].stride()
    for branch in (torch.randn(x.shape), torch.randn(x.shape, dtype=torch.bfloat16)):
        out = functional.gated_residual(x, branch, torch.zeros(1))
        assert torch.equal(out, x)
        assert (out.dtype, out.stride()) == (x.dtype, x.stride())
        assert out.data_ptr() != x.data_ptr()
        opened = functional.gated_residual(x, branch, torch.full((1,), 0.5))
        torch.testing.assert_close(opened, (x.double() + 0.5 * branch.double()).to(dtype), rtol=0.02, atol=0.02)


def test_gated_residual_gradients():
    x, branch = (torch.randn(2, 3, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.gated_residual, (x, branch, gamma))
    permuted = x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(functional.gated_residual, (permuted, branch, gamma))


def test_summaries():
    x = torch.tensor([[[[1.0, 2], [3, 10]]]])
    assert functional.summarize(x, "max").tolist() == [[[[10]]]]
    assert functional.summarize(x, "mean").tolist() == [[[[4]]]]
    assert functional.summarize(x[..., :0], "max").tolist() == [[[[0]]]]


def test_difference_refuses_to_broadcast():
    x = torch.ones(2, 3, 4, 4)
    assert functional.difference(3 * x, x).unique().tolist() == [2]
    with pytest.raises(BlockError, match=r"must keep the shape of its input: got \(2, 3, 1, 1\) for \(2, 3, 4, 4\)"):
        functional.difference(x[..., :1, :1], x)


@pytest.mark.parametrize("size", [(2, 3), (0, 3), (2, 0)])
def test_pointwise(size: tuple[int, int]):
    x = torch.randn(2, 4, *size, requires_grad=True)
    weight, bias = torch.randn(5, 4, 1, 1), torch.randn(5)
    expected = torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0]) + bias[:, None, None]
    torch.testing.assert_close(functional.pointwise(x, weight, bias), expected)
