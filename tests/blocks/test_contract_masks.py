"""What every attending form promises about masks, and about the weights it shows."""

import pytest
import torch
from block_forms import ATTENDING, Case, cores, seed, swept
from torch import Tensor, fx

from sagan_attn import functional
from sagan_attn.blocks.norms import BranchNorm
from sagan_attn.errors import BlockError

pytestmark = pytest.mark.parametrize("case", swept(ATTENDING))


def some_mask() -> Tensor:
    """[3, 5, 6]: positions here and there; a whole window of pooling hidden; nothing but one position."""
    mask = torch.rand(3, 5, 6) < 0.6
    mask[1, :4] = False
    mask[2] = False
    mask[2, 3, 5] = True
    return mask


def test_an_all_true_mask_is_no_mask(case: Case):
    x, mask = torch.randn(2, 8, 5, 6), torch.ones(2, 5, 6, dtype=torch.bool)
    for training in (False, True):
        outputs = []
        for options in ({}, case.masks(mask)):
            block = case.opened().train(training)
            seed(1)  # for dropout
            outputs.append(block(x, **options))
        torch.testing.assert_close(outputs[1], outputs[0])


def test_hidden_positions_reach_only_themselves(case: Case):
    block, x, mask = case.opened(), torch.randn(3, 8, 5, 6), some_mask()
    expected = block(x, **case.masks(mask))
    assert (expected - block(x)).abs().max() > 1e-3
    for change in (torch.randn_like(x), torch.full_like(x, 1e4), -1e4 * torch.ones_like(x)):
        changed = torch.where(mask[:, None], x, x + change)
        output = block(changed, **case.masks(mask))
        seen = mask[:, None].expand_as(x)
        torch.testing.assert_close(output[seen], expected[seen])
        assert (output[~seen] != expected[~seen]).any()


def test_hidden_positions_get_gradients_from_themselves_alone(case: Case):
    block, mask = case.opened(), some_mask()
    x = torch.randn(3, 8, 5, 6, requires_grad=True)
    seen = mask[:, None].expand_as(x)
    (grad,) = torch.autograd.grad(block(x, **case.masks(mask))[seen].square().sum(), x)
    assert grad[~seen].count_nonzero() == 0
    assert grad[seen].count_nonzero() > 0


def test_a_sample_without_any_position_stays_finite(case: Case):
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[1] = False
    for block in (case.opened(), case.opened().train()):
        x = torch.randn(2, 8, 5, 6, requires_grad=True)
        output = block(x, **case.masks(mask))
        assert output.isfinite().all()
        output.square().sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in (x, *block.parameters()))
    for dtype in (torch.float16, torch.bfloat16):
        assert case.opened().to(dtype)(torch.randn(2, 8, 5, 6, dtype=dtype), **case.masks(mask)).isfinite().all()
    weights = case.opened().attention_weights(x, mask=mask)
    assert weights[1].count_nonzero() == 0
    assert weights[0].count_nonzero() > 0


def test_an_empty_map_with_a_mask(case: Case):
    for shape in [(0, 8, 4, 4), (2, 8, 0, 3), (2, 8, 3, 0)]:
        mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
        assert case.opened()(torch.randn(shape), **case.masks(mask)).shape == shape


def test_masks_that_do_not_fit(case: Case):
    block, x = case.opened(), torch.randn(2, 8, 5, 6)
    right = torch.ones(2, 5, 6, dtype=torch.bool)
    for mask in (right.float(), right.long(), right.mT, right[:1], right[:, None], right[0], right.flatten(1)):
        for name in case.masks(right):
            with pytest.raises(BlockError, match=r"mask of shape .* must be boolean, True at positions to attend to"):
                block(x, **{name: mask})
        with pytest.raises(BlockError, match=r"of shape \[B, H, W\] = \(2, 5, 6\)"):
            block.attention_weights(x, mask=mask)


def test_weights(case: Case):
    block, x, mask = case.opened(), torch.randn(3, 8, 5, 6), some_mask()
    pool = cores(block)[0].pool
    shown = functional.key_mask(x, pool, mask, cores(block)[0].pool_ceil)
    for options, allowed in (({}, torch.ones_like(shown)), ({"mask": mask}, shown)):
        weights = block.attention_weights(x, **options)
        assert weights.shape == (3, *block.attention_shape(5, 6))
        assert weights.masked_select(~allowed).count_nonzero() == 0
        if case.softmax:
            torch.testing.assert_close(weights.sum(-1), allowed.any(-1).float().expand(weights.shape[:3]))
            assert (weights >= 0).all()
        chosen = torch.tensor([29, 0, 7, 7])
        torch.testing.assert_close(block.attention_weights(x, chosen, **options), weights[:, :, chosen])
        own = torch.tensor([[1, 2], [3, 3], [29, 0]])
        expected = torch.stack([weights[b][:, own[b]] for b in range(3)])
        torch.testing.assert_close(block.attention_weights(x, own, **options), expected)


def test_weights_of_a_window_count_its_visible_positions(case: Case):
    block = case.opened()
    pool = cores(block)[0].pool
    mask = some_mask()
    height, width = (5, 6) if cores(block)[0].pool_ceil else (5 // pool * pool, 6 // pool * pool)
    windows = [
        [mask[:, i : i + pool, j : j + pool].flatten(1).any(1) for j in range(0, width, pool)]
        for i in range(0, height, pool)
    ]
    visible = torch.stack([torch.stack(row, -1) for row in windows], -2).flatten(1)  # [B, M]
    weights = block.attention_weights(torch.randn(3, 8, 5, 6), mask=mask)
    hidden = ~visible[:, None, None].expand_as(weights)
    assert weights[hidden].count_nonzero() == 0
    if case.softmax:
        assert (weights[~hidden] > 0).all()


def test_the_output_is_the_weighted_sum(case: Case):
    """From the weights that are shown, the values and the last convolution, with einsum."""
    block, x, mask = case.opened().double(), torch.randn(3, 8, 5, 6, dtype=torch.float64), some_mask()
    for options in ({}, {"mask": mask}):
        for core in cores(block):
            pooled_first = core.value(functional.pool_map(x, core.pool, options.get("mask"), core.pool_ceil))
            pooled_last = functional.pool_map(core.value(x), core.pool, options.get("mask"), core.pool_ceil)
            value = (pooled_first if core.pool_first else pooled_last).flatten(2).unflatten(1, (core.heads, -1))
            branch = torch.einsum("bhnm,bhdm->bhdn", core.attention_weights(x, **options), value)
            branch = branch.flatten(1, 2).unflatten(2, (5, 6))
            branch = branch if core.output is None else core.output(branch)
            torch.testing.assert_close(core.branch(x, **options), branch)
            if core is not block:
                continue
            if isinstance(getattr(block, "norm", None), BranchNorm):
                branch = block.norm(branch)
            expected = x + getattr(block, "gamma", 1.0) * branch
            torch.testing.assert_close(block(x, **options), expected)


def test_a_traced_block_takes_a_mask(case: Case):
    block, x, mask = case.opened(), torch.randn(3, 8, 5, 6), some_mask()
    traced = fx.symbolic_trace(block)
    torch.testing.assert_close(traced(x, **case.masks(mask)), block(x, **case.masks(mask)))
    torch.testing.assert_close(traced(x), block(x))
