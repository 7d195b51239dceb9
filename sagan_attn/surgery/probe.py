"""What really happens in a forward pass: which modules fire, and what maps they put out."""

import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sagan_attn.errors import GraftError, first_line

__all__ = ["Firing", "default_example", "is_compiled", "map_size", "probe", "quiet"]

Log = list[tuple[type[nn.Module], tuple[int, ...]]]


@dataclass
class Firing:
    """What one module does over a forward pass.

    Args:
        shapes: of its outputs.
        others: what the outputs are that are no float tensor.
        taken: shapes of the first tensor of 4 dimensions in its inputs, of the calls that have one.
        done: how many calls of other modules were done before its last call was.
        log: class and shape of each map of 4 dimensions that any module of the model put out, in order.
        ends: length of the log right after each of `shapes`.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    taken: list[tuple[int, ...]] = field(default_factory=list)
    done: int = -1
    log: Log = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.shapes) + len(self.others)


def probe(model: nn.Module, example_input: Any, modules: Mapping[str, nn.Module]) -> dict[str, Firing]:
    """Run the model once and record what each of `modules` takes and puts out, and in which order.

    The pass is in eval mode, without gradients and with the random state put back, so batch-norm statistics, modes
    and generators are as before. A tuple is passed as positional arguments, a dict as keyword arguments, anything
    else as the one argument; tensors go to the device and floating dtype of the model's parameters.

    Raises `GraftError` for an input that the model does not take, from what the model itself raises.
    """
    log: Log = []
    firings = {name: Firing(log=log) for name in modules}
    order = itertools.count()
    handles = []
    example_input = _like_parameters(model, example_input)
    try:
        for module in model.modules():
            if not is_compiled(module):
                handles.append(module.register_forward_hook(_logger(log)))
        for name, module in modules.items():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                handles.append(module.register_forward_hook(_recorder(firings[name], order), with_kwargs=True))
        with quiet(model):
            _run(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return firings


def _run(model: nn.Module, example_input: Any) -> None:
    try:
        if isinstance(example_input, tuple):
            model(*example_input)
        elif isinstance(example_input, dict):
            model(**example_input)
        else:
            model(example_input)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model may raise on an input it is not made for
        raise _refusal(model, error) from error


def _refusal(model: nn.Module, error: Exception) -> GraftError:
    words = f"{first_line(error)} ({type(error).__name__})"
    return GraftError(f"example_input is none that {type(model).__name__} takes: {words}")


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and modes and random state restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices]), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def default_example(model: nn.Module) -> Tensor:
    """An input for a model that came without one, from timm's input size or the first convolution's channels.

    Raises `GraftError` when the model has neither.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and "input_size" in config:
        return torch.zeros(1, *config["input_size"], device="cpu")  # whatever the default device
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return torch.zeros(1, module.in_channels, 224, 224, device="cpu")
    raise GraftError(f"no input size can be worked out for {type(model).__name__}: pass example_input")


def map_size(example_input: Any) -> tuple[int, int] | None:
    """Height and width of the first image in an input, None if there is none."""
    for leaf in pytree.tree_leaves(example_input):
        if isinstance(leaf, Tensor) and leaf.dim() >= 3:
            return leaf.shape[-2], leaf.shape[-1]
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether the module runs compiled or scripted code, which ignores hooks added later."""
    if module._compiled_call_impl is not None or isinstance(module, torch.jit.ScriptModule):
        return True
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing can be compiled, and importing it is slow
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _logger(log: Log) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim() == 4:
            log.append((type(module), tuple(output.shape)))

    return note


def _recorder(firing: Firing, order: Iterator[int]) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        firing.done = next(order)
        maps = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() == 4)
        firing.taken += [tuple(leaf.shape) for leaf in itertools.islice(maps, 1)]
        if isinstance(output, Tensor) and output.is_floating_point():
            firing.shapes.append(tuple(output.shape))
            firing.ends.append(len(firing.log))
        elif isinstance(output, Tensor):
            firing.others.append(f"a tensor of {output.dtype}")
        else:
            firing.others.append(f"a {type(output).__name__}")

    return record


def _like_parameters(model: nn.Module, example_input: Any) -> Any:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return example_input

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        try:
            return leaf.to(parameter.device, parameter.dtype if leaf.is_floating_point() else leaf.dtype)
        except NotImplementedError as error:  # a tensor without values
            raise _refusal(model, error) from error

    return pytree.tree_map(move, example_input)
