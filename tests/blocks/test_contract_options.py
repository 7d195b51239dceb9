"""What every form refuses, and that it fits timm's slot for attention layers."""

import functools

import pytest
import timm
import torch
from block_forms import CASES, FOUR_HEADS, Case, learning

from sagan_attn import SelfAttention2d
from sagan_attn.blocks import block_names, create_block
from sagan_attn.blocks.registry import get_form
from sagan_attn.errors import BlockError


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unknown_options_and_channels(case: Case):
    message = f"block '{case.name}' has no option 'hedas'; it has .*(heads|reduction|parameters).*, device, dtype$"
    with pytest.raises(BlockError, match=message):
        case.fresh(hedas=2)
    for channels in (0, -8, True, 8.0):
        with pytest.raises(BlockError, match=rf"in_channels \({channels}\) must be a whole number of at least 1"):
            case.fresh(channels)
    block = case.fresh().eval()
    for shape in [(1, 6, 3, 3), (8, 3, 3), (1, 8, 3)]:
        with pytest.raises(BlockError, match="required"):
            block(torch.randn(shape))


@pytest.mark.parametrize("name", FOUR_HEADS)
def test_heads_that_do_not_divide(name: str):
    for channels in (1, 3, 6):
        with pytest.raises(BlockError, match=r"heads \(4\) must divide the (inner|query) channels.* \(\d\)"):
            create_block(name, channels)
    create_block(name, 6, heads=3)


REFUSED = [
    ("heads", 0, r"heads \(0\) must be a whole number of at least 1"),
    ("heads", 2.0, r"heads \(2.0\) must be a whole number"),
    ("heads", True, r"heads \(True\) must be a whole number"),
    ("heads", 3, r"heads \(3\) must divide the"),
    ("reduction", 0, r"reduction \(0\) must be a whole number of at least 1"),
    ("reduction", 0.5, r"reduction \(0.5\) must be a whole number"),
    ("reduction", "half", r"reduction \('half'\) must be a whole number"),
    ("reduction", 9, r"reduction \(9\) leaves 0 channels of in_channels \(8\)"),
    ("value_reduction", 0, r"value_reduction \(0\) must be a whole number of at least 1"),
    ("value_reduction", 9, r"value_reduction \(9\) leaves 0 channels of in_channels \(8\)"),
    ("context_channels", 0, r"context_channels \(0\) must be a whole number of at least 1"),
    ("divisor", 0, r"divisor \(0\) must be a whole number of at least 1"),
    ("expansion", 0, r"expansion \(0\) must be a whole number of at least 1"),
    ("pool", 0, r"pool \(0\) must be a whole number of at least 1"),
    ("pool", 1.5, r"pool \(1.5\) must be a whole number"),
    ("position_size", 0, r"position_size \(0\) must be a whole number of at least 1"),
    ("position_size", (4, -1), r"position_size \(-1\) must be a whole number of at least 1"),
    ("path", "fast", r"path \('fast'\) must be .*'factored'"),
    ("position", "absolute", r"position \('absolute'\) must be None, 'relative', 'relative_scaled' or 'sinusoidal'"),
    ("init", "xavier", r"init \('xavier'\) must be 'torch', 'normal', 'kaiming' or 'trunc_normal'"),
    ("mode", "softmax", r"mode \('softmax'\) must be 'embedded_gaussian', .* or 'concatenation'"),
    ("score", "concat", r"score \('concat'\) must be 'dot' or 'additive'"),
    ("activation", "silu", r"activation \('silu'\) must be 'relu' or 'gelu'"),
    ("reduce", "sum", r"reduce \('sum'\) must be 'max' or 'mean'"),
    ("scale", "root", r"scale \('root'\) must be a number, 'sqrt'"),
    ("scale", True, r"scale \(True\) must be a number"),
    ("dropout", 1.0, r"dropout \(1.0\) must be a number of at least 0 and below 1"),
    ("dropout", 1.5, r"dropout \(1.5\) must be a number"),
    ("dropout", -0.1, r"dropout \(-0.1\) must be a number"),
    ("parameters", 0, r"parameters \(0\) must be a whole number of at least 1"),
    ("parameters", 16, r"parameters \(16\) must be at least 17, those of one hidden channel"),
    ("gamma_init", float("inf"), r"gamma_init \(inf\) must be a finite number"),
    ("dropout", "much", r"dropout \('much'\) must be a number"),
]


@pytest.mark.parametrize(("option", "value", "message"), REFUSED, ids=lambda v: str(v)[:20])
def test_every_block_refuses_a_value_of_the_wrong_kind(option: str, value: object, message: str):
    """Every form that has the option, with relative positions where there are sizes for them."""
    having = []
    for name in block_names():
        options: dict[str, object] = {option: value}
        if option == "position_size":
            options |= {"position": "relative"} | ({"pool": 1} if get_form(name).options.get("pool") else {})
        if (name, option, value) == ("nonlocal-timm", "reduction", 9):
            continue  # rounded up to 8
        try:
            create_block(name, 8, **options)
        except BlockError as error:
            if "has no option" in str(error):
                continue
            with pytest.raises(BlockError, match=message):
                create_block(name, 8, **options)
            having.append(name)
        else:
            pytest.fail(f"{name} takes {option}={value!r}")
    assert having


@pytest.mark.parametrize("position", ["relative", "relative_scaled"])
def test_relative_positions_need_keys_at_the_positions_of_the_queries(position: str):
    with pytest.raises(BlockError, match=rf"position \('{position}'\) needs .* pool must be 1"):
        create_block("sagan", 8, position=position, pool=2)
    with pytest.raises(BlockError, match="pool must be 1"):
        create_block("botnet", 8, pool=2)


def test_sinusoids_need_channels_in_fours():
    for name in ("sagan", "additive"):
        with pytest.raises(BlockError, match=r"position \('sinusoidal'\) needs channels in fours, not 6"):
            create_block(name, 6, position="sinusoidal")
    with pytest.raises(BlockError, match="needs channels in fours, not 6"):
        create_block("encoder", 6, heads=3, position="sinusoidal")


def test_unknown_names():
    with pytest.raises(BlockError, match=r"unknown block 'sagn'; did you mean .*sagan"):
        create_block("sagn", 8)


def test_options_override_those_of_the_name():
    assert create_block("biggan", 8, pool=3).pool == 3
    assert create_block("biggan", 8, value_reduction=4).value.out_channels == 2
    assert create_block("botnet", 8, heads=2).heads == 2
    assert create_block("nonlocal-timm", 64, reduction=2).value.out_channels == 32
    assert create_block("sagan", 8, gamma_init=0.25).gamma.tolist() == [0.25]
    for name in ("multihead", "cross", "encoder", "decoder"):
        assert all(p.count_nonzero() for p in create_block(name, 8, zero_init=False, bias=False).parameters())


def small_resnet(layer) -> torch.nn.Module:
    return timm.create_model(
        "resnet18",
        layers=(1, 1, 1, 1),
        channels=(8, 16, 16, 16),
        num_classes=3,
        zero_init_last=False,  # a block on zeros has nothing to learn from
        block_args={"attn_layer": layer},
    )


def check_slot(model: torch.nn.Module, kind: type, count: int) -> None:
    """The blocks are there, run, and all their parameters are reached."""
    blocks = [module for module in model.modules() if type(module) is kind]
    assert len(blocks) == count
    with torch.no_grad():
        for block in blocks:
            for parameter in block.parameters():
                if not parameter.count_nonzero():
                    parameter.normal_(0, 0.1)
    output = model(torch.randn(2, 3, 64, 64))
    output.square().sum().backward()
    assert output.isfinite().all()
    for block in blocks:
        assert all(parameter.grad is not None for parameter in learning(block).values())
        assert all(m.weight.grad.count_nonzero() for name, m in block.named_modules() if name.endswith("value"))


@pytest.mark.parametrize("name", block_names())
def test_timm_takes_every_form_as_its_attention_layer(name: str):
    check_slot(small_resnet(functools.partial(create_block, name)), get_form(name).factory, 4)


def test_timm_takes_the_class():
    model = timm.create_model("resnet18", block_args=dict(attn_layer=SelfAttention2d))
    assert len([module for module in model.modules() if isinstance(module, SelfAttention2d)]) == 8
    before = model.eval()(image := torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1)  # timm starts the last one of a stage at 0
    assert not torch.equal(model(image), before)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    gammas = [module.gamma for module in model.modules() if isinstance(module, SelfAttention2d)]
    assert all(gamma.grad.count_nonzero() for gamma in gammas)
