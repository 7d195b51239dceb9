"""What the tests of converted state dicts share: random values, and the comparison of two modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.blocks import create_block
from sagan_attn.blocks.converters import convert, convert_back

Apply = Callable[[Tensor], Tensor]


def randomized(module: nn.Module) -> nn.Module:
    """In float64, with values everywhere that no initialisation gives."""
    module.double()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        with torch.no_grad():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif not name.endswith(("_u", "_v", "u0", "sv0", "num_batches_tracked")):
                tensor.normal_(0.2, 0.5)
    return module


def assert_same(ours: Apply, theirs: Apply, *x: Tensor) -> None:
    """Outputs, and gradients for the inputs."""
    x = tuple(tensor.clone().requires_grad_() for tensor in x)
    outputs = [ours(*x), theirs(*x)]
    assert (outputs[0].abs() > 1e-3).any()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-11)
    towards = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, x, towards) for output in outputs]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


def assert_round_trip(source: str, theirs: dict[str, Tensor], *, like: bool = False) -> None:
    back = convert_back(convert(theirs, source), source, like=theirs if like else None)
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert back[key].shape == tensor.shape, key
        assert torch.equal(back[key], tensor), key


def loaded(name: str, theirs: nn.Module, channels: int = 16, source: str = "auto", **options: Any) -> nn.Module:
    block = create_block(name, channels, dtype=torch.float64, **options)
    block.load_state_dict(convert(theirs.state_dict(), source))
    return block.train(theirs.training)
