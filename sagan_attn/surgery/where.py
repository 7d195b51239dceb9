"""Places by meaning: the output of a stage, the last map at a stride, the last one of a resolution."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery.place import check_open
from sagan_attn.surgery.probe import Firing, map_size, probe
from sagan_attn.surgery.select import host_names, is_plain_sequential
from sagan_attn.surgery.sites import find_places, maps_of

__all__ = ["Stage", "Where", "find_stages"]

Size = tuple[int, int]
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Stage:
    """All of a forward pass that happens at one resolution, and where it ends.

    Args:
        name: the module whose output is the last map of that resolution.
        size: height and width of that map.
        number: as in "stage:<number>"; None for a resolution of the stem.
        stride: image size over map size; None where height and width disagree, or without an image.
    """

    name: str
    size: Size
    number: int | None = None
    stride: int | None = None

    def __str__(self) -> str:
        words = [f"{kind}:{n}" for kind, n in (("stage", self.number), ("stride", self.stride)) if n is not None]
        return f"{self.name!r} ({', '.join([*words, f'resolution:{self.size[0]}x{self.size[1]}'])})"


class Where:
    """Words such as "stage:-1" of a model to module names. The model is run once, when the first word is asked for.

    Args:
        model: the host.
        example: makes the input the model is run on.
    """

    def __init__(self, model: nn.Module, example: Callable[[], Any]) -> None:
        self.model = model
        self.example = example

    @cached_property
    def stages(self) -> list[Stage]:
        return find_stages(self.model, self.example())

    def __call__(self, word: str) -> str:
        """The module that "stage:<number>", "stride:<number>" or "resolution:<height>[x<width>]" means.

        Raises:
            GraftError: the word is none of these, or the model has no such place; the message lists those it has.
        """
        match = re.fullmatch(r"(stage):([+-]?\d+)|(stride):(\d+)|(resolution):(\d+)(?:x(\d+))?", word)
        if match is None:
            raise GraftError(
                f"at ({word!r}) must be stage:<number>, stride:<number>, resolution:<side> or "
                "resolution:<height>x<width>"
            )
        stages = self.stages
        if match[1]:
            numbered = [stage for stage in stages if stage.number is not None]
            number = int(match[2])
            number += len(numbered) if number < 0 else 0
            found = [stage for stage in numbered if stage.number == number]
        elif match[3]:
            found = [stage for stage in stages if stage.stride == int(match[4])]
        else:
            size = (int(match[6]), int(match[7] or match[6]))
            found = [stage for stage in stages if stage.size == size]
        if not found:
            raise GraftError(
                f"{type(self.model).__name__} has no {word} for this input; it has "
                f"{', '.join(map(str, stages)) or 'no maps larger than 1 x 1'}"
            )
        return found[-1].name


def find_stages(model: nn.Module, example_input: Any) -> list[Stage]:
    """The resolutions the model's maps go through in one forward pass, from the largest to the smallest.

    A stage ends at the last place a block can go, in the order in which modules are done, with a map of its
    resolution; of a block and mere norms and activations behind it, at the block. What a block does inside is no
    place of its own here: a bottleneck works on the old size before it strides, a squeeze-and-excite layer on 1 x 1.
    So one looks into modules without a map as their output, plain Sequentials that change the size, and modules that
    go through sizes in between; not into others. A module that holds several stages ends none. Identities, adaptive
    poolings and maps of 1 x 1 do not count.

    A block is a module of two or more convolutions or linear layers that does not itself make the image smaller.
    Numbers begin at the first resolution with a block, so what comes before, the stem, has none; without any block
    they begin at the first resolution.

    Raises:
        GraftError: the model is compiled or wrapped, or does not take that input.
    """
    check_open(model, "")
    names = host_names(model)
    firings = probe(model, example_input, {name: model.get_submodule(name) for name in names})
    image_size = map_size(example_input)
    given = {name: _size(Firing(firing.shapes, firing.others), image_size) for name, firing in firings.items()}
    taken = {name: _size(Firing(firing.taken), image_size) for name, firing in firings.items()}
    trunk = _trunk(model, names, given, taken)
    sizes = sorted(set(trunk.values()), key=_area, reverse=True)
    strides = _strides(sizes, image_size)
    places = find_places(model, firings, image_size)
    blocks = {
        name
        for name, size in trunk.items()
        if (taken[name] == size or taken[name] != image_size) and _is_block(model.get_submodule(name))
    }
    stages = []
    for size in sizes:
        ends = [
            name
            for name in sorted(trunk, key=lambda name: firings[name].done)
            if trunk[name] == size
            and name in places
            and not any(trunk[inner] not in (size, taken[name]) for inner in trunk if inner.startswith(name + "."))
        ]
        if ends:
            mixing = [name for name in ends if _weights(model.get_submodule(name))]
            last = mixing[-1] if mixing and mixing[-1] in blocks else ends[-1]
            stages.append(Stage(last, size, None, strides[size]))
    block_sizes = {trunk[name] for name in blocks}
    first = next((index for index, stage in enumerate(stages) if stage.size in block_sizes), 0)
    return [replace(stage, number=i - first if i >= first else None) for i, stage in enumerate(stages)]


def _size(firing: Firing, image_size: Size | None) -> Size | None:
    """Height and width of what a module puts out or takes, None if that is no map or differs between its calls."""
    try:
        sizes = {(height, width) for _, height, width in maps_of("", firing, image_size).sizes}
    except GraftError:
        return None
    return sizes.pop() if len(sizes) == 1 else None


def _trunk(
    model: nn.Module, names: list[str], given: Mapping[str, Size | None], taken: Mapping[str, Size | None]
) -> dict[str, Size]:
    """Size of the map of each module that counts and is not inside of a block or of one step down."""
    trunk = {}
    closed: tuple[str, ...] = ()
    for name in names:  # parents come before their children
        size, before, module = given[name], taken[name], model.get_submodule(name)
        if name.startswith(closed) or size is None:
            continue
        if size != (1, 1) and not isinstance(module, NOTHING):
            trunk[name] = size
        through = before != size and (
            before is None
            or is_plain_sequential(module)
            or any(
                inner is not None and min(_area(before), _area(size)) < _area(inner) < max(_area(before), _area(size))
                for other, inner in given.items()
                if other.startswith(name + ".")
            )
        )
        if not through:
            closed += (name + ".",)
    return trunk


def _area(size: Size) -> int:
    return size[0] * size[1]


def _strides(sizes: list[Size], image_size: Size | None) -> dict[Size, int | None]:
    """How many pixels a step on each map is: the product of the steps down to it, each rounded to a whole number."""
    strides: dict[Size, int | None] = {}
    before, down, across = image_size, 1, 1
    for size in sizes:
        if before is None:
            strides[size] = None
            continue
        down, across = down * round(before[0] / size[0]), across * round(before[1] / size[1])
        strides[size] = down if down == across else None
        before = size
    return strides


def _is_block(module: nn.Module) -> bool:
    return _weights(module) > 1 and any(True for _ in module.children())


def _weights(module: nn.Module) -> int:
    """How many weights it has that mix positions or channels: not those of norms."""
    return sum(parameter.dim() > 1 for parameter in module.parameters())
