"""Models and images of the command line."""

import argparse
import difflib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.errors import ConfigError, GraftError, first_line
from sagan_attn.surgery.probe import default_example, probe

__all__ = ["add_model_arguments", "create_model", "example_image", "image_size", "json_object"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`model`, `--model-options` and `--image-size`."""
    parser.add_argument("model", help="resnet50 or timm/resnet50 (timm's), torchvision/resnet50; without its weights")
    parser.add_argument(
        "--model-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="""of its constructor: '{"in_chans": 1}'""",
    )
    parser.add_argument(
        "--image-size", type=image_size, metavar="SIDE|HxW", help="224 or 480x640; by default the model's own, or 224"
    )


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, as an argparse type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object, such as {{"pool": 2}}')
    return value


def image_size(text: str) -> tuple[int, int]:
    """Height and width from "224" or "480x640", as an argparse type."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} must be a side in pixels or <height>x<width>: 224 or 480x640")
    return int(sides[0]), int(sides[-1])


def create_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model of that name with fresh weights, in eval mode: timm's, unless the name says another library.

    Raises:
        ConfigError: an unknown name, with near ones, or options the model refuses.
    """
    import timm

    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        from sagan_attn.training.hosts import HostConfig, build_host

        try:
            return build_host(HostConfig(name, options=dict(options)), num_classes=1000).eval()
        except ConfigError as error:
            near = difflib.get_close_matches(plain, timm.list_models())
            raise ConfigError(f"{error}; near names in timm: {', '.join(near)}" if near else str(error)) from error
    try:
        return timm.create_model(plain, **options).eval()
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model {name!r} with options {dict(options)} is refused: {error}") from error


def example_image(model: nn.Module, name: str, size: tuple[int, int] | None) -> Tensor:
    """One black image [1, C, H, W] the model is known to take; of the model's own size by default.

    Raises:
        ConfigError: the model does not take an image of that size.
    """
    example = default_example(model)
    if size is not None:
        example = torch.zeros(*example.shape[:2], *size)
    try:
        probe(model, example, {})
    except GraftError as error:
        height, width = example.shape[-2:]
        why = first_line(error.__cause__ or error)  # what the model says itself
        raise ConfigError(f"{name} does not take images of {height} x {width}: {why}") from error
    return example
