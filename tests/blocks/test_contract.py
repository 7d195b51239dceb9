"""What every form, and the gate around others, promises: shapes, identity, independence, gradients, copies."""

import copy
import pickle

import pytest
import torch
from block_forms import SHAPES, Case, layouts, learning, swept
from gated_forms import CONTRACT
from torch import Tensor, nn

pytestmark = pytest.mark.parametrize("case", swept(CONTRACT))


def assert_identical(output: Tensor, x: Tensor) -> None:
    assert torch.equal(output, x)
    assert (output.dtype, output.stride()) == (x.dtype, x.stride())


def check_shape(block: nn.Module, x: Tensor) -> None:
    """Output like the input, and a finite gradient for the input and every parameter."""
    x = x.detach().requires_grad_()
    output = block(x)
    assert output.shape == x.shape
    assert output.isfinite().all()
    if x.numel():
        assert (output != x).any()
    output.sum().backward()
    for tensor in (x, *learning(block).values()):
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.isfinite().all()


def test_every_shape(case: Case):
    for shape in filter(case.takes, SHAPES):
        check_shape(case.opened(), torch.randn(shape))
    for shape in [(2, 8, 4, 4), (0, 8, 4, 4), (1, 8, 1, 1)]:
        if case.takes(shape, training=True):
            check_shape(case.opened().train(), torch.randn(shape))


def test_every_number_of_channels(case: Case):
    for channels in case.channels():
        x = torch.randn(2, channels, 4, 5)
        check_shape(case.opened(channels), x)
        if case.identity:
            assert_identical(case.fresh(channels)(x), x)


@pytest.mark.slow
def test_large_maps(case: Case):
    check_shape(case.opened(), torch.randn(1, 8, 72, 120))  # above the limit of scores held at once


SELDOM = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *SELDOM], ids=str)
def test_a_fresh_block_is_the_identity_in_every_layout_and_dtype(case: Case, dtype: torch.dtype):
    if not case.identity:
        pytest.skip("a norm behind the sum changes the map whatever the weights")
    for training in (False, True):
        block = case.fresh().to(dtype).train(training)
        for shape in [(2, 8, 5, 6)] if training or dtype == torch.float64 else [(2, 8, 5, 6), (2, 8, 1, 6)]:
            for layout, x in layouts(torch.randn(shape, dtype=dtype)).items():
                assert_identical(block(x), x)
                if layout == "transposed" or not case.takes_autocast(dtype):
                    continue
                with torch.autocast("cpu", torch.bfloat16):
                    assert_identical(block(x), x)
        for shape in [(1, 8, 6, 1), (2, 8, 1, 1), (0, 8, 4, 4), (1, 8, 0, 3)]:
            if not case.takes(shape, training):
                continue
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
                assert_identical(block(x), x)


def test_an_open_block_keeps_dtype_and_strides(case: Case):
    if not case.identity:
        pytest.skip("a norm behind the sum decides the strides")
    for dtype in (torch.float32, torch.bfloat16):
        block = case.opened().to(dtype)
        for x in layouts(torch.randn(2, 8, 5, 6, dtype=dtype)).values():
            for autocast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = block(x)
                assert (output.dtype, output.stride()) == (dtype, x.stride())


def test_gradients(case: Case):
    """Along random directions; every entry of the Jacobian in the slow run."""
    channels = min(channels for channels in case.channels() if channels >= 4)
    for block in gradient_blocks(case, channels):
        check_gradients(block, (2, channels, 2, 2), fast_mode=True)


@pytest.mark.slow
def test_every_entry_of_the_jacobian(case: Case):
    for block in gradient_blocks(case, 8):
        check_gradients(block, (2, 8, 2, 3))
        check_gradients(block, (2, 8, 1, 1))


def gradient_blocks(case: Case, channels: int) -> list[nn.Module]:
    """The block in eval mode, and in train mode where a batch norm makes that another function."""
    block = case.opened(channels).double()
    norms = any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
    return [block, copy.deepcopy(block).train()] if norms else [block]


def check_gradients(block: nn.Module, shape: tuple[int, ...], fast_mode: bool = False) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    keys = list(learning(block))

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(keys, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *learning(block).values()), fast_mode=fast_mode)


def test_nan_in_the_branch_is_not_hidden(case: Case):
    values = [module for name, module in case.fresh().named_modules() if name.rpartition(".")[2] == "value"]
    for index in range(len(values)):
        block = case.fresh()
        value = [module for name, module in block.named_modules() if name.rpartition(".")[2] == "value"][index]
        with torch.no_grad():
            value.weight.fill_(torch.nan)
        assert block(torch.randn(1, 8, 3, 3)).isnan().all()


def test_input_is_left_alone(case: Case):
    for block in (case.fresh(), case.opened(), case.opened().train()):
        x = torch.randn(2, 8, 4, 4)
        before = x.clone()
        output = block(x)
        assert torch.equal(x, before)
        output.detach().zero_()
        assert torch.equal(x, before)


def test_state_dict_and_copies(case: Case):
    block, x = case.opened(), torch.randn(2, 8, 4, 5)
    expected = block(x)
    fresh = case.fresh().eval()
    fresh.load_state_dict(block.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), expected)
        assert list(other.state_dict()) == list(block.state_dict())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert not torch.equal(other(x), expected)
    assert torch.equal(block(x), expected)


def test_layout_does_not_change_the_numbers(case: Case):
    block, x = case.opened(), torch.randn(2, 8, 5, 6)
    for one in layouts(x).values():
        torch.testing.assert_close(block(one), block(x))


def test_transposing_the_map_transposes_the_output(case: Case):
    block, x = case.opened(), torch.randn(2, 8, 5, 6)
    turned = block(x.transpose(2, 3)).transpose(2, 3)
    if case.directions:
        assert (turned - block(x)).abs().max() > 1e-4
    else:
        torch.testing.assert_close(turned, block(x))


def test_positions_are_told_apart_only_where_that_is_asked_for(case: Case):
    block, x = case.opened(), torch.randn(2, 8, 4, 6)
    if case.options.get("pool", 1) > 1 or case.name in ("biggan", "nonlocal-caffe2", "nonlocal-alexhex7"):
        pytest.skip("windows of pooling know their neighbours")
    order = torch.randperm(24)
    shuffled = block(x.flatten(2)[..., order].unflatten(2, (4, 6))).flatten(2)
    if case.directions:
        assert (shuffled - block(x).flatten(2)[..., order]).abs().max() > 1e-4
    else:
        torch.testing.assert_close(shuffled, block(x).flatten(2)[..., order])


def test_samples_do_not_mix(case: Case):
    block, x = case.opened(), torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(block(x)[1:2], block(x[1:2]))


def test_every_parameter_can_be_made_on_a_device_in_a_dtype(case: Case):
    block = case.fresh(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}
    assert {b.device.type for b in block.buffers()} <= {"meta"}
    block = case.fresh(dtype=torch.float64)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    assert block(x).dtype == torch.float64
    assert list(block.state_dict()) == list(case.fresh().state_dict())


def test_the_global_random_state_alone_decides_the_first_weights(case: Case):
    one, other = case.fresh(), case.fresh()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
