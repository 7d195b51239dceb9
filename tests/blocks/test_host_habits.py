"""What hosts and tools do to modules inside of them, done to the blocks."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from block_forms import opened
from torch import nn
from torch.optim.swa_utils import update_bn

from sagan_attn import graft
from sagan_attn.blocks import block_names, create_block
from sagan_attn.blocks.pointwise import SpectralPointwise


@pytest.mark.parametrize("name", block_names())
def test_first_weights_survive_those_of_a_host(name: str):
    """timm draws new weights for each `nn.Conv2d`, also where zeros make the identity."""
    model = timm.create_model("resnet18", block_args={"attn_layer": partial(create_block, name)}).eval()
    x = torch.randn(1, 64, 4, 4)
    assert torch.equal(model.layer1[0].se(x), x)
    for module in model.modules():
        if isinstance(module, SpectralPointwise):
            expected = torch.linalg.matrix_norm(module.weight[:, :, 0, 0], 2)
            estimate = module.weight_u @ module.weight[:, :, 0, 0] @ module.weight_v
            torch.testing.assert_close(estimate, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("momentum", [None, 0.1, 0.3])
def test_batch_statistics_are_those_of_torch(momentum: float | None):
    ours = opened("nonlocal", 8).train()
    theirs = copy.deepcopy(ours)
    theirs.norm = nn.BatchNorm2d(8)
    theirs.norm.load_state_dict(ours.norm.state_dict())
    ours.norm.momentum = theirs.norm.momentum = momentum
    for _ in range(4):
        x = torch.randn(4, 8, 5, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.norm.state_dict(), theirs.norm.state_dict())


def test_update_bn():
    ours = opened("nonlocal", 8)
    theirs = copy.deepcopy(ours)
    theirs.norm = nn.BatchNorm2d(8)
    theirs.norm.load_state_dict(ours.norm.state_dict())
    data = [torch.randn(4, 8, 5, 5) * 3 + 1 for _ in range(5)]
    update_bn(data, ours)
    update_bn(data, theirs)
    torch.testing.assert_close(ours.norm.state_dict(), theirs.norm.state_dict())


def test_batch_norm_without_running_statistics():
    block, x = opened("nonlocal", 8), torch.randn(2, 8, 4, 4)
    expected = opened("nonlocal", 8).train()(x)
    torch.func.replace_all_batch_norm_modules_(block)
    torch.testing.assert_close(block.eval()(x), expected)
    assert block(x[:1, :, :1, :1]).isfinite().all()


def test_one_value_a_channel_moves_no_statistics():
    block = opened("nonlocal", 8).train()
    before = copy.deepcopy(block.norm.state_dict())
    block(torch.randn(1, 8, 1, 1))
    torch.testing.assert_close(block.norm.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(7, 7), (5, 8), (2, 3), (3, 2)])
@pytest.mark.parametrize("name", ["nonlocal-alexhex7", "nonlocal-caffe2"])
def test_non_local_pooling_is_that_of_the_public_codes(name: str, size: tuple[int, int]):
    block, x = opened(name, 8), torch.randn(2, 8, *size)
    if block.pool_first:
        key, value = (conv(F.max_pool2d(x, 2)).flatten(2) for conv in (block.key, block.value))
    else:
        key, value = (F.max_pool2d(conv(x), 2).flatten(2) for conv in (block.key, block.value))
    weights = (block.scale * block.query(x).flatten(2).mT @ key).softmax(-1)
    assert block.attention_shape(*size) == (1, *weights.shape[1:])
    y = block.output((value @ weights.mT).unflatten(2, size))
    torch.testing.assert_close(block(x), x + block.norm(y))


def test_a_gate_that_is_needed_learns():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    x = torch.randn(2, 3, 8, 8)
    grafts = graft(model, "1", "encoder", gate=True, options={"norm_first": False}, example_input=x)
    optimizer = torch.optim.Adam(grafts.param_groups(1e-2))
    before = {name: p.detach().clone() for name, p in grafts.named_parameters()}
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    moved = [name for name, p in grafts.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) >= len(before) - 1  # but for the key bias


def test_the_mask_of_a_map_that_is_its_own_context():
    block = opened("decoder", 16)
    x, mask = torch.randn(2, 16, 6, 6), torch.ones(2, 6, 6, dtype=torch.bool)
    mask[..., 4:] = False
    other = x.clone()
    other[..., 4:] = 9
    torch.testing.assert_close(block(x, mask=mask)[..., :4], block(other, mask=mask)[..., :4])


@pytest.mark.parametrize("samples", [1, 3, 64])
def test_many_samples_do_not_make_chunks_of_single_queries(samples: int, monkeypatch):
    from sagan_attn.functional import paths

    monkeypatch.setattr(paths, "CHUNK_SCORES", 1000)
    sizes = []
    run = paths._materialised
    monkeypatch.setattr(paths, "_materialised", lambda q, *rest: sizes.append(tuple(q.shape)) or run(q, *rest))
    q, v = torch.randn(samples, 2, 12, 4), torch.randn(samples, 2, 12, 5)
    lens = torch.full((samples, 12), 12)  # a length for each query, which takes checkpoints
    out = paths.attend(q, q, v, path="chunked", valid_lens=lens)
    torch.testing.assert_close(out, paths.attend(q, q, v, path="materialised"))
    assert all(shape[2] == 12 for shape in sizes)  # 12 x 12 x 2 scores a sample: 3 samples at a time
    assert len(sizes) == -(-samples // 3)
