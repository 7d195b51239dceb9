"""Weights of torch's attention and transformer layers under this library's names."""

import torch
from torch import Tensor, nn

NAMES = {"self_attn": "attention", "multihead_attn": "cross", "out_proj": "output"}
LETTERS = {"q": "query", "k": "key", "v": "value"}


def tensors(module: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """Parameters of `nn.MultiheadAttention` or a transformer layer or stack of torch, or their gradients."""
    found = {}
    for name, parameter in module.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        *path, last = name.split(".")
        prefix = "".join(f"{NAMES.get(part, part)}." for part in path)
        if last.startswith("in_proj_"):
            kind = last.removeprefix("in_proj_")
            found |= {f"{prefix}{n}.{kind}": t for n, t in zip(LETTERS.values(), tensor.chunk(3), strict=True)}
        elif last.endswith("_proj_weight"):
            found[f"{prefix}{LETTERS[last[0]]}.weight"] = tensor
        else:
            found[prefix + last] = tensor
    return found


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """After backward through both: every parameter of ours has the gradient of its counterpart."""
    expected = tensors(theirs, gradients=True)
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad.flatten(),
            expected[name].flatten(),
            rtol=rtol,
            atol=atol,
            msg=lambda m, name=name: f"gradient of {name}: {m}",
        )
