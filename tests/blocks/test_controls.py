"""Blocks without attention that attention has to beat: their parameters, their gates, and their real classes."""

import pytest
import torch
from block_forms import CONTROLS, learning, opened
from hosts import HOSTS
from timm.layers import GlobalContext, SEModule
from torch import nn

from sagan_attn import freeze_host, fuse, graft, head_importance, summary
from sagan_attn.blocks import SelfAttention2d, create_block
from sagan_attn.blocks.bottleneck import Bottleneck2d
from sagan_attn.blocks.checks import narrowed
from sagan_attn.errors import BlockError, GraftError
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import ClassifierModule


def count(name: str, channels: int, **options) -> int:
    return sum(p.numel() for p in create_block(name, channels, device="meta", **options).parameters())


def loaded(block: nn.Module, theirs: nn.Module, names: dict[str, str]) -> nn.Module:
    """The block with the weights of another one, by our names for its parts, and gamma 1."""
    state = {
        f"{own}.{key}": value for own in names for key, value in theirs.get_submodule(names[own]).state_dict().items()
    }
    assert len(state) == len(theirs.state_dict())
    block.load_state_dict({**state, "gamma": torch.ones(1)}, strict=True)
    return block


@pytest.mark.parametrize("channels", [1, 3, 8, 20, 64])
@pytest.mark.parametrize("reduction", [None, 1])
def test_identity_has_the_parameters_of_attention(channels: int, reduction: int | None):
    torch.manual_seed(5)
    attention = SelfAttention2d(channels, reduction=reduction).state_dict()
    torch.manual_seed(5)
    block = create_block("identity", channels, reduction=reduction)
    assert list(block.state_dict()) == list(attention)
    assert all(torch.equal(attention[name], value) for name, value in block.state_dict().items())
    assert list(learning(block)) == ["gamma", "value.weight", "value.bias"]


def test_identity_is_attention_to_oneself():
    """Where the scores of each position with itself are far above all others, attention is the identity matrix."""
    block, attention = opened("identity", 8), SelfAttention2d(8, reduction=1)
    x = torch.eye(8).reshape(1, 8, 2, 4)  # one channel a position
    with torch.no_grad():
        attention.value.load_state_dict(block.value.state_dict())
        attention.gamma.copy_(block.gamma)
        for conv in (attention.query, attention.key):
            conv.weight.copy_(100 * torch.eye(8)[:, :, None, None])
            conv.bias.zero_()
    assert torch.equal(attention.attention_weights(x)[0, 0], torch.eye(8))
    torch.testing.assert_close(block(x), attention(x))


def test_nothing_waits_for_the_query_and_key_of_identity():
    made = graft(HOSTS["tiny"].build(), "top", "identity", example_input=HOSTS["tiny"].images(1))
    trained = {parameter for group in made.param_groups(lr=0.1) for parameter in group["params"]}
    assert trained == {made[0].block.value.weight, made[0].block.value.bias, made[0].block.gamma}
    block = opened("identity").train()
    block(torch.randn(2, 8, 3, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in learning(block).values())  # what DDP needs


def test_freezing_the_host_thaws_nothing():
    model = HOSTS["tiny"].build()
    (one,) = graft(model, "top", "identity", example_input=HOSTS["tiny"].images(1))
    freeze_host(model)
    assert list(learning(one.block)) == ["gamma", "value.weight", "value.bias"]
    assert summary(model).grafts[0].trainable == count("identity", 16) - 2 * 2 * 17
    module = ClassifierModule(HostConfig("resnet20"), freeze_host=True, channels_last=False)
    module.setup_network(model, 5)
    assert list(learning(one.block)) == ["gamma", "value.weight", "value.bias"]


@pytest.mark.parametrize("name", ["identity", "conv", "se", "gc"])
def test_controls_have_no_heads(name: str):
    model = HOSTS["tiny"].build()
    graft(model, "top", name, example_input=HOSTS["tiny"].images(1))
    with pytest.raises(GraftError, match="no grafted attention"):
        head_importance(model, [])


def test_conv_has_the_parameters_of_attention_within_2_percent():
    for channels in [*range(16, 200), 256, 320, 511, 512, 1000, 1024, 2048]:
        target = count("sagan", channels)
        assert abs(count("conv", channels) / target - 1) <= 0.02, channels
    for channels in range(64, 200):
        assert abs(count("conv", channels) / count("sagan", channels) - 1) <= 0.006, channels
    for channels in range(1, 16):
        create_block("conv", channels)


@pytest.mark.parametrize("channels", [1, 5, 16, 33])
@pytest.mark.parametrize("parameters", [70, 100, 333, 1_000, 4_321, None])
def test_conv_comes_nearest_of_all_widths_and_biases(channels: int, parameters: int | None):
    target = count("sagan", channels) if parameters is None else parameters
    possible = [
        2 * channels * hidden + hidden * squeeze + channels * expand + 1
        for hidden in range(1, 3 + target // (2 * channels))
        for squeeze in (0, 1)
        for expand in (0, 1)
    ]
    found = count("conv", channels, parameters=parameters)
    assert abs(found - target) == min(abs(one - target) for one in possible)


def test_conv_matches_another_blocks_parameters():
    target = count("biggan", 64)
    assert abs(count("conv", 64, parameters=target) / target - 1) < 0.01
    assert isinstance(create_block("conv", 8, parameters=17), Bottleneck2d)
    with pytest.raises(BlockError, match=r"parameters \(16\) must be at least 17, .* for in_channels \(8\)"):
        create_block("conv", 8, parameters=16)


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
@pytest.mark.parametrize(("channels", "reduction"), [(32, 4), (16, 1), (12, 3)])
def test_se_is_timms(channels: int, reduction: int, size: tuple[int, int]):
    theirs = SEModule(channels, rd_channels=narrowed(channels, "reduction", reduction)).double()
    names = {"squeeze": "fc1", "expand": "fc2"}
    ours = loaded(create_block("se", channels, reduction=reduction, dtype=torch.float64), theirs, names)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        ours.gamma.fill_(0.3)
    torch.testing.assert_close(ours(x), x + 0.3 * (theirs(x) - x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
@pytest.mark.parametrize(("channels", "reduction"), [(32, 4), (16, 1), (12, 3)])
def test_gc_is_timms(channels: int, reduction: int, size: tuple[int, int]):
    hidden = narrowed(channels, "reduction", reduction)
    theirs = GlobalContext(channels, fuse_add=True, fuse_scale=False, rd_channels=hidden).double()
    theirs.mlp_add.norm.eps = 1e-5
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    names = {"score": "conv_attn", "squeeze": "mlp_add.fc1", "norm": "mlp_add.norm", "expand": "mlp_add.fc2"}
    ours = loaded(create_block("gc", channels, reduction=reduction, dtype=torch.float64), theirs, names)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        ours.gamma.fill_(0.3)
    torch.testing.assert_close(ours(x), x + 0.3 * (theirs(x) - x), rtol=1e-11, atol=1e-11)


def test_widths_by_default():
    assert [create_block("se", c).squeeze.out_channels for c in (1, 8, 128, 256, 2048)] == [8, 8, 8, 16, 128]
    assert [create_block("gc", c).squeeze.out_channels for c in (1, 8, 128, 256, 2048)] == [8, 8, 8, 16, 128]
    for channels in (128, 256, 2048):  # as timm's
        assert count("se", channels) - 1 == sum(p.numel() for p in SEModule(channels).parameters())


@pytest.mark.parametrize("name", CONTROLS)
def test_the_gamma_kit(name: str):
    model = HOSTS["tiny"].build()
    made = graft(model, "top", name, example_input=HOSTS["tiny"].images(1), options={"gamma_init": 0.0})
    (gamma,) = made.gammas().values()
    assert gamma.shape == (1,)
    assert gamma.item() == 0
    groups = {group["name"]: group for group in made.param_groups(lr=0.1, weight_decay=0.5, gamma_lr_scale=7)}
    (alone,) = groups["grafts/gamma"]["params"]
    assert alone is gamma
    assert (groups["grafts/gamma"]["lr"], groups["grafts/gamma"]["weight_decay"]) == (pytest.approx(0.7), 0)
    assert create_block(name, 8, gamma_init=0.25).gamma.tolist() == [0.25]
    assert not summary(fuse(model)).grafts  # a closed gate is left out
    with torch.no_grad():
        gamma.fill_(0.5)
    images = HOSTS["tiny"].images()
    torch.testing.assert_close(fuse(model)(images), model.eval()(images))


def test_weights_of_an_empty_map():
    for name in ("se", "gc"):
        block = opened(name)
        for shape in [(2, 8, 0, 3), (0, 8, 2, 2)]:
            assert block(torch.randn(shape)).shape == shape
