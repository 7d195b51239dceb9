"""The forms of the block tests, every registered name and variants of them, and blocks that do something."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sagan_attn.blocks import block_names, create_block
from sagan_attn.blocks.base import MapAttention

FOUR_HEADS = ("botnet", "multihead", "cross", "encoder", "decoder")  # by default
CONTROLS = ("context-max", "context-mean", "identity", "conv", "se", "gc")  # no attention, and no masks or paths


@dataclass(frozen=True)
class Case:
    """A registered name with options, and what they mean for the tests."""

    id: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def fresh(self, channels: int = 8, **more: Any) -> nn.Module:
        seed()
        return create_block(self.name, channels, **{**self.options, **more})

    def opened(self, channels: int = 8, **more: Any) -> nn.Module:
        return opened(self.name, channels, **{**self.options, **more})

    @property
    def attends(self) -> bool:
        """Whether there is attention, and with it masks, weights and paths."""
        return self.name not in CONTROLS

    @property
    def identity(self) -> bool:
        """Norms behind the sums change the map whatever the weights: such a layer cannot start as the identity."""
        return self.options.get("norm_first", True)

    @property
    def directions(self) -> bool:
        """Whether rows and columns are told apart."""
        return self.name == "botnet" or "position" in self.options

    @property
    def softmax(self) -> bool:
        return self.options.get("mode") not in ("dot_product", "concatenation")

    def channels(self) -> tuple[int, ...]:
        """Numbers of channels to test. Forms without a limit must take 1 and 3."""
        return channel_counts(self.name, **self.options)

    def takes(self, shape: tuple[int, ...], training: bool = False) -> bool:
        """Whether a map of that shape can be an input."""
        return True

    def takes_autocast(self, dtype: torch.dtype) -> bool:
        """Whether parameters of that dtype work under an autocast to bfloat16."""
        return True

    def masks(self, mask: Tensor) -> dict[str, Tensor]:
        """Arguments of forward that hide positions of the map from all attention in the block."""
        return {"mask": mask} | ({"context_mask": mask} if self.name == "decoder" else {})

    def __str__(self) -> str:
        return self.id


def _cases(name: str, variants: dict[str, dict[str, Any]]) -> list[Case]:
    return [Case(f"{name} {words}", name, options) for words, options in variants.items()]


NAMES = [Case(name, name) for name in block_names()]
VARIANTS = [
    *_cases(
        "sagan",
        {
            "2 heads": {"heads": 2, "reduction": 2},
            "pooled": {"pool": 2},
            "pooled in threes": {"pool": 3, "value_reduction": 2, "heads": 2, "reduction": 2},
            "relative": {"position": "relative", "position_size": (3, 5)},
            "sinusoidal": {"position": "sinusoidal"},
            "chunked": {"path": "chunked"},
        },
    ),
    *_cases(
        "nonlocal",
        {
            "gaussian": {"mode": "gaussian"},
            "gaussian pooled": {"mode": "gaussian", "pool": 2},
            "dot product": {"mode": "dot_product"},
            "dot product materialised": {"mode": "dot_product", "path": "materialised"},
            "concatenation": {"mode": "concatenation"},
            "concatenation pooled": {"mode": "concatenation", "pool": 2, "pool_first": True},
            "without norm": {"norm": False},
            "dot product without norm": {"mode": "dot_product", "norm": False},
            "chunked": {"path": "chunked"},
        },
    ),
    *_cases(
        "multihead",
        {
            "bias": {"bias": True},
            "relative": {"position": "relative", "position_size": 3},
            "relative scaled": {"position": "relative_scaled", "position_size": (3, 5)},
            "sinusoidal": {"position": "sinusoidal"},
            "dropout": {"dropout": 0.3},
            "relative chunked": {"position": "relative", "position_size": 5, "path": "chunked"},
        },
    ),
    *_cases(
        "additive",
        {
            "2 heads": {"heads": 2, "reduction": 1, "bias": True},
            "relative": {"position": "relative", "position_size": 4},
            "chunked": {"path": "chunked"},
        },
    ),
    *_cases("cross", {"bias": {"bias": True, "reduction": 2}}),
    *_cases(
        "encoder",
        {
            "relative": {"position": "relative", "position_size": 5},
            "norm last": {"norm_first": False},
            "relu without bias": {"activation": "relu", "bias": False},
            "dropout": {"dropout": 0.2},
            "chunked": {"path": "chunked"},
        },
    ),
    *_cases("decoder", {"sinusoidal": {"position": "sinusoidal"}, "norm last": {"norm_first": False}}),
]
CASES = [*NAMES, *VARIANTS]
ATTENDING = [case for case in CASES if case.attends]
FEW_VARIANTS = (
    "sagan pooled",
    "sagan relative",
    "sagan chunked",
    "nonlocal dot product",
    "nonlocal concatenation",
    "multihead relative scaled",
    "multihead dropout",
    "additive 2 heads",
    "encoder norm last",
    "decoder sinusoidal",
)


def swept(cases: list[Case]) -> list[Any]:
    """For `parametrize`: every form, and the variants of their options but a few in the slow run."""
    seldom = {case.id for case in VARIANTS} - {*FEW_VARIANTS}
    return [pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.id in seldom else []) for case in cases]


def cases(*ids: str) -> list[Case]:
    """The cases of these ids, in this order."""
    known = {case.id: case for case in CASES}
    return [known[one] for one in ids]


def channel_counts(name: str, **options: Any) -> tuple[int, ...]:
    """Numbers of channels a form takes: multiples of its heads, of 4 for sinusoids; any without these."""
    factor = options.get("heads", 4 if name in FOUR_HEADS else 1) * options.get("reduction", 1)
    if options.get("position") == "sinusoidal":
        factor = max(factor, 4)
    return (8, 1, 3) if factor == 1 else (8, factor, 3 * factor)


def seed(number: int = 0) -> None:
    """`torch.manual_seed` for the CPU; that one also formats the stack, for a GPU that may come later, at each call."""
    torch.default_generator.manual_seed(number)


def opened(name: str, channels: int = 8, **options: Any) -> nn.Module:
    """The block in eval mode, with a branch that contributes and no parameter or statistic at a special value.

    All first weights of 0 and of nearly 0 (those of N(0, 0.01)) become seeded others.
    """
    seed()
    return contributing(create_block(name, channels, **options))


def contributing(block: nn.Module) -> nn.Module:
    """The block, changed to be as `opened` says."""
    block.eval()
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.abs().mean() < 0.05:
                parameter.normal_(0, 0.4)
            elif (parameter == 1).all():
                parameter.uniform_(0.5, 1.5)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        if hasattr(block, "gamma"):
            block.gamma.fill_(0.5)
    return block


def cores(block: nn.Module) -> list[MapAttention]:
    """What attends in a block: the block itself, or its parts."""
    return [module for module in block.modules() if isinstance(module, MapAttention)]


def learning(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients: all but those of `identity` that can change nothing."""
    return {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same map in several memory formats."""
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.to(memory_format=torch.channels_last),
        "NHWC permuted": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


SHAPES = [
    (2, 8, 4, 4),
    (1, 8, 5, 3),
    (0, 8, 4, 4),
    (2, 8, 1, 1),
    (2, 8, 1, 6),
    (2, 8, 7, 1),
    (2, 8, 0, 3),
    (2, 8, 3, 0),
    (0, 8, 0, 0),
]
