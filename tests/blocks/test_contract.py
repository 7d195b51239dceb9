"""What every registered block promises."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

from sagan_attn.blocks import block_names, create_block
from sagan_attn.errors import BlockError

pytestmark = pytest.mark.parametrize("name", block_names())


def opened(name: str, channels: int = 8, gamma: float = 0.5, **options) -> nn.Module:
    """The block with its gate at `gamma` and biases off zero."""
    torch.manual_seed(0)
    block = create_block(name, channels, **options).eval()
    with torch.no_grad():
        block.gamma.fill_(gamma)
    return block


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same map in several memory formats."""
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.to(memory_format=torch.channels_last),
        "NHWC permuted": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


def assert_identical(output: Tensor, x: Tensor) -> None:
    assert torch.equal(output, x)
    assert (output.dtype, output.stride()) == (x.dtype, x.stride())


SHAPES = [
    (2, 8, 4, 4),
    (1, 8, 5, 3),
    (0, 8, 4, 4),
    (2, 8, 1, 1),
    (2, 8, 1, 6),
    (2, 8, 7, 1),
    (2, 8, 0, 3),
    (2, 8, 3, 0),
]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3, 3), (2, 3, 4, 5), (0, 3, 0, 0)])
def test_every_shape(name: str, shape: tuple[int, ...]):
    x = torch.randn(shape, requires_grad=True)
    fresh = create_block(name, shape[1])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_identical(fresh(x.to(memory_format=memory_format)), x.to(memory_format=memory_format))
    block = opened(name, shape[1])
    output = block(x)
    assert output.shape == x.shape
    if x.numel():
        assert (output != x).any()
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_identity_at_gamma_0_in_every_layout_and_dtype(name: str, dtype: torch.dtype, training: bool):
    block = create_block(name, 8).to(dtype).train(training)
    for shape in [(2, 8, 5, 6), (2, 8, 1, 6), (1, 8, 6, 1), (2, 8, 1, 1)]:
        for x in layouts(torch.randn(shape, dtype=dtype)).values():
            assert_identical(block(x), x)
            with torch.autocast("cpu", torch.bfloat16):
                assert_identical(block(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(name: str, dtype: torch.dtype):
    x = torch.randn(2, 8, 5, 6)
    expected = opened(name).double()(x.double())
    output = opened(name).to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(opened(name)(x).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype):
        mixed = opened(name)(x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), expected, rtol=0.05, atol=0.05)


def test_large_maps_stay_finite_in_float16(name: str):
    block = opened(name, gamma=1e-3).half()
    x = torch.full((1, 8, 3, 3), 1000.0, dtype=torch.float16)  # q.k of about 10^6
    x[..., 1, 1] = -1000
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            if key in ("query.weight", "key.weight"):
                parameter.fill_(1.0)
    assert block(x).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 8, 2, 3), (2, 8, 1, 1)])
def test_gradients(name: str, shape: tuple[int, ...]):
    block = opened(name).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    keys = [key for key, _ in block.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(keys, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *block.parameters()))


def test_nan_in_the_branch_is_not_hidden_by_gamma_0(name: str):
    block = create_block(name, 8)
    with torch.no_grad():
        block.value.bias.fill_(torch.nan)
    assert block(torch.randn(1, 8, 3, 3)).isnan().all()


def test_input_is_left_alone(name: str):
    x = torch.randn(2, 8, 4, 4)
    before = x.clone()
    opened(name)(x)
    assert torch.equal(x, before)


def test_state_dict_and_copies(name: str):
    block, x = opened(name), torch.randn(2, 8, 4, 5)
    expected = block(x)
    fresh = create_block(name, 8)
    fresh.load_state_dict(block.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.gamma.zero_()
        assert torch.equal(other(x), x)
    assert torch.equal(block(x), expected)


def test_layout_does_not_change_the_numbers(name: str):
    block, x = opened(name), torch.randn(2, 8, 5, 6)
    for one in layouts(x).values():
        torch.testing.assert_close(block(one), block(x))
    turned = block(x.transpose(2, 3))  # attention and means know no directions
    torch.testing.assert_close(turned.transpose(2, 3), block(x))


def test_samples_do_not_mix(name: str):
    block, x = opened(name), torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(block(x)[1:2], block(x[1:2]))


def test_symbolic_trace(name: str):
    block = opened(name)
    traced = fx.symbolic_trace(block)
    for shape in SHAPES:
        x = torch.randn(shape)
        assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(name: str, dynamic: bool):
    torch.compiler.reset()
    block = opened(name).train()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 8, 4, 4), (3, 8, 5, 7)]:
        x = torch.randn(shape, requires_grad=True)
        output = compiled(x)
        torch.testing.assert_close(output, block(x))
        ours, theirs = torch.autograd.grad(output.sum(), x), torch.autograd.grad(block(x).sum(), x)
        torch.testing.assert_close(ours, theirs)


def test_exports_with_dynamic_batch_and_size(name: str):
    block, auto = opened(name), torch.export.Dim.AUTO
    exported = torch.export.export(block, (torch.randn(2, 8, 6, 7),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    module = exported.module()
    for shape in [(2, 8, 6, 7), (5, 8, 4, 9), (1, 8, 2, 3)]:
        x = torch.randn(shape)
        torch.testing.assert_close(module(x), block(x))
    assert not any("autocast" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
def test_onnx(name: str, tmp_path):
    check_onnx(opened(name), tmp_path)


def check_onnx(block: nn.Module, folder) -> None:
    ort = pytest.importorskip("onnxruntime")
    auto = torch.export.Dim.AUTO
    torch.onnx.export(
        block,
        (torch.randn(2, 8, 6, 8),),
        str(folder / "block.onnx"),
        dynamo=True,
        dynamic_shapes=({0: auto, 2: auto, 3: auto},),
        verbose=False,
    )
    session = ort.InferenceSession(str(folder / "block.onnx"))
    for shape in [(2, 8, 6, 8), (3, 8, 4, 5)]:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), block(x), rtol=1e-4, atol=1e-5)


def test_unknown_option_and_channels(name: str):
    with pytest.raises(BlockError, match=f"block '{name}' has no option 'hedas'; it has .*gamma_init"):
        create_block(name, 8, hedas=2)
    with pytest.raises(BlockError, match=r"channels \(0\) must be a whole number of at least 1"):
        create_block(name, 0)
    with pytest.raises(BlockError, match=r"a map \[B, 8, H, W\] is required"):
        create_block(name, 8)(torch.randn(1, 6, 3, 3))
    assert create_block(name, 8, gamma_init=0.25).gamma.tolist() == [0.25]
