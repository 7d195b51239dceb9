"""Where a number that is not finite comes from: the batch is run again, and the first module that made one is named."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sagan_attn.surgery import grafts_of
from sagan_attn.surgery.probe import is_compiled

__all__ = ["Culprit", "all_finite", "culprit", "describe", "spoiled_rows", "spoiled_tensors"]


@dataclass
class Culprit:
    """The first module, in the order of a forward pass, with an output that is not finite.

    Args:
        name: of the module in the network; "" for the network itself.
        kind: its class.
        given: whether its input is finite.
        spoiled: its parameters and buffers that are not finite.
        graft: name and site of the graft it lies in; None for a module of the host.
    """

    name: str
    kind: str
    given: bool
    spoiled: list[str]
    graft: tuple[str, str] | None = None

    def __str__(self) -> str:
        where = f"{self.name!r} ({self.kind}" if self.name else f"the network itself ({self.kind}"
        if self.graft:
            where += ", in the branch of graft {!r} at {!r}".format(*self.graft)
        state = "its input is finite" if self.given else "its input is not either, though no module put that out"
        if self.spoiled:
            state += f", {', '.join(self.spoiled[:3])} in it {'is' if len(self.spoiled) == 1 else 'are'} not"
        return f"the first module with an output that is not finite is {where}): {state}"


def describe(
    module: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    context: Callable[[], AbstractContextManager[Any]],
) -> str:
    """What is not finite, and where it was made.

    The module's buffers, such as running statistics, are moved by one more forward pass.

    Args:
        module: takes images; its network, if it has one, is the one whose modules are named.
        batch: images [B, C, H, W] and labels [B, ...].
        loss: or any output.
        gradients: by parameter, in the order of the network.
        context: what the forward pass runs in, such as autocast.
    """
    images, labels = batch
    said = [] if all_finite(loss) else [f"the loss is {_word(loss)}"]
    for name, values in (("image", images), ("label", labels)):
        if rows := spoiled_rows(values):
            listed = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            verb = "is" if len(rows) == 1 else "are"
            said.append(f"{name}{'s' * (len(rows) > 1)} {listed} of the {len(values)} in the batch {verb} not finite")
    if spoiled_rows(images):
        return "; ".join(said)
    spoiled = [name for name, gradient in gradients.items() if not all_finite(gradient)]
    if spoiled and not said:
        said.append("the loss is finite, its gradients are not")
    network = getattr(module, "network", module)
    with context():
        found = culprit(network, lambda: module(images))
    if found is not None:
        return "; ".join([*said, str(found)])
    said.append("every module's output is finite")
    if spoiled:  # a backward pass meets the last parameters first
        said.append(f"the first gradient that is not is that of {spoiled[-1]!r} ({len(spoiled)} are not)")
    return "; ".join(said)


def culprit(network: nn.Module, run: Callable[[], Any]) -> Culprit | None:
    """Run `run`, which calls the network, without gradients, and name the first module whose output is not finite.

    None if every module's output is finite. A compiled network runs as it was before that. No hook stays, and the
    random state is as before; buffers that a forward pass changes are not put back.
    """
    found: list[Culprit] = []
    given: dict[nn.Module, bool] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = bool(found) or all_finite((args, kwargs))  # now, because some change their input

    def after(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all_finite(output):
                found.append(Culprit(name, type(module).__name__, given[module], spoiled_tensors(module)))

        return look

    devices = {p.device.index for p in network.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        if any(is_compiled(module) for module in network.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code runs no hooks
        for name, module in network.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            # before the grafts' own hook, so that a module's output is told apart from what its grafts make of it
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name), prepend=True).remove)
        stack.enter_context(torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)))
        stack.enter_context(torch.no_grad())
        run()
    for graft in grafts_of(network) if found else ():
        if f"{found[0].name}.".startswith(f"{graft.path}."):
            found[0].graft = graft.name, graft.site
    return found[0] if found else None


def spoiled_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters that are not finite, and of the buffers with a NaN; those may hold a mask of -inf."""
    parameters = [name for name, parameter in module.named_parameters() if not all_finite(parameter)]
    return parameters + [name for name, b in module.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]


def spoiled_rows(values: Tensor) -> list[int]:
    """Which rows of a batch hold a NaN or an infinite number."""
    if not values.is_floating_point() or not values.numel():
        return []
    return (~values.detach().flatten(1).isfinite()).any(dim=1).nonzero().flatten().tolist()


def all_finite(values: Any) -> bool:
    """Whether every number of every floating tensor in there is finite."""
    leaves = pytree.tree_leaves(values)
    return all(bool(x.isfinite().all()) for x in leaves if isinstance(x, Tensor) and x.is_floating_point())


def _word(value: Tensor) -> str:
    return "nan" if bool(value.isnan().any()) else "inf" if bool((value == torch.inf).any()) else "-inf"
