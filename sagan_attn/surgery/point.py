"""The one thing a graft adds to a host: a child that holds blocks, and a forward hook that runs them.

Why this and nothing else: wrapping a stage in a new container renames its state-dict keys and hides its methods; a
hook that closes over a block keeps it out of `parameters()` and shares it between deep copies. So the blocks live in
an ordinary child, named `grafts`, and the hook is a plain function that reaches them through the module it runs on;
both are copied, pickled, compiled and exported like anything else. The child's own forward is the identity, because
some containers call each of their children in turn.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["CHILD", "GraftPoint", "Spec", "points", "run_grafts"]

CHILD = "grafts"


@dataclass(frozen=True)
class Spec:
    """How a block was made, in words alone, so that it is copied and pickled with any block.

    Args:
        block: registered name; None for a block of a class or factory, which has none.
        made_by: qualified name of the class or factory, "" for a registered block.
        options: JSON object.
        unwritable: options that a file cannot hold, by name, and why.
        gate: whether the block is wrapped in `Gated`.
        channels: of the maps it was made for.
    """

    block: str | None
    made_by: str
    options: str
    unwritable: tuple[tuple[str, str], ...]
    gate: bool
    channels: int


class GraftPoint(nn.Module):
    """The blocks grafted at one place, run in the order of their insertion.

    Args:
        layout: "NCHW" or "NHWC", that of the maps at this place; blocks always see [B, C, H, W].
    """

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.sites: dict[str, str] = {}  # block name -> the site as it was asked for
        self.specs: dict[str, Spec] = {}  # block name -> how it was made
        self.off: tuple[str, ...] = ()  # names of disabled blocks, once for each `disabled()` they are in

    def forward(self, x: Any) -> Any:
        return x

    def run(self, x: Tensor) -> Tensor:
        """The blocks, one after the other, on a map in this point's layout."""
        for name, block in self._modules.items():
            if block is None or name in self.off:
                continue
            if self.layout == "NHWC":
                x = block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            else:
                x = block(x)
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights of the host alone load with strict=True: blocks they know nothing of stay as they are.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside `disabled()` would have no block that could ever enable it again.
        return {**self.__dict__, "off": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "specs": state.get("specs", {})})  # 0.1.0 pickled points without


def run_grafts(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: the output of `module`, passed through the blocks grafted to it."""
    return module.get_submodule(CHILD).run(output)  # type: ignore[operator]


def points(model: nn.Module) -> dict[str, tuple[nn.Module, GraftPoint]]:
    """Name of each module with grafts -> that module and its point, in the order of `named_modules`."""
    found = {}
    for name, module in model.named_modules():
        point = module._modules.get(CHILD)
        if isinstance(point, GraftPoint):
            found[name] = (module, point)
    return found


def insert(anchor: nn.Module, layout: str, name: str, site: str, block: nn.Module, spec: Spec | None = None) -> None:
    """Put a block at an anchor, making the point and its hook if this is the first."""
    point = anchor._modules.get(CHILD)
    if not isinstance(point, GraftPoint):
        point = GraftPoint(layout)
        point.training = anchor.training
        anchor.add_module(CHILD, point)
        anchor.register_forward_hook(run_grafts)
    point.add_module(name, block)
    point.sites[name] = site
    if spec is not None:
        point.specs[name] = spec


def remove(anchor: nn.Module, name: str) -> None:
    """Take a block from an anchor; with the last one the point and its hook go too."""
    point: GraftPoint = anchor._modules[CHILD]  # type: ignore[assignment]
    del point._modules[name], point.sites[name]
    point.specs.pop(name, None)
    point.off = tuple(other for other in point.off if other != name)
    if not point._modules:
        del anchor._modules[CHILD]
        hooks = anchor._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is run_grafts]:
            del hooks[key]
