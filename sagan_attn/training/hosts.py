"""Hosts by name: torchvision's and timm's models, and those of `small_hosts`."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sagan_attn.errors import ConfigError
from sagan_attn.surgery import grafts_of
from sagan_attn.training.data import Preprocess
from sagan_attn.training.small_hosts import SMALL_HOSTS, small_host
from sagan_attn.training.tensor_files import load_tensors

__all__ = ["HostConfig", "build_host", "find_head", "host_preprocess", "resolve_host"]


@dataclass(frozen=True)
class HostConfig:
    """A CNN by name.

    Args:
        name: "lookup-cnn"; "resnet9" (made for speed); "resnet20", 32, 44, 56 or 110 (the CIFAR ResNets);
            "torchvision/<name>"; "timm/<name>". The prefix may be left out where only one library has that name.
        pretrained: load the library's pretrained weights (downloaded on first use) and give the model a new head.
        weights: a file of weights instead, .safetensors or .pt/.pth holding a state dict; a head with another number
            of classes is left as initialised.
        small_images: for images of about 32 pixels: the first convolution becomes 3x3 with stride 1 and the max
            pooling after it goes.
        options: further arguments of the model's constructor.
    """

    name: str
    pretrained: bool = False
    weights: str | None = None
    small_images: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def build_host(config: HostConfig, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The model of that name with `num_classes` outputs.

    Raises:
        ConfigError: an unknown name or option, weights that are missing or do not fit, or channels the model cannot
            take.
    """
    library, name = resolve_host(config.name)
    if config.pretrained and (config.weights or library == "own"):
        other = "weights" if config.weights else f"host {config.name!r}, which has no pretrained weights"
        raise ConfigError(f"pretrained does not go with {other}")
    try:
        if library == "own":
            model = small_host(name, num_classes, in_channels, **config.options)
        elif library == "timm":
            import timm

            model = timm.create_model(
                name, pretrained=config.pretrained, num_classes=num_classes, in_chans=in_channels, **config.options
            )
        else:
            model = _torchvision(name, config, num_classes, in_channels)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"host {config.name!r} with options {config.options} is refused: {error}") from error
    except OSError as error:  # no network, or a hub that does not answer
        raise ConfigError(
            f"pretrained weights of {config.name!r} cannot be had ({error}); download them once where there is a "
            "network, or name a local file with host.weights"
        ) from error
    if config.small_images:
        _small_stem(model, config.name)
    if config.weights:
        _load_weights(model, Path(config.weights), num_classes)
    return model


def find_head(model: nn.Module) -> nn.Module:
    """The last layer with parameters that is a Linear or a convolution: the classifier. Raises `ConfigError`."""
    grafted = {module for graft in grafts_of(model) for module in graft.block.modules()}
    heads = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in grafted]
    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
            return head
    if not heads:
        raise ConfigError(f"{type(model).__name__} has no linear or convolutional layer to be its head")
    return heads[-1]


def resolve_host(name: str) -> tuple[str, str]:
    """Library ("own", "torchvision" or "timm") and name in it of a host. Raises `ConfigError` for an unknown one."""
    prefix, slash, rest = name.partition("/")
    if not slash:
        if name in SMALL_HOSTS:
            return "own", name
        prefix, rest = "", name
    elif prefix not in ("torchvision", "timm"):
        raise ConfigError(f"host {name!r}: the part before the slash must be torchvision or timm")

    known = {library: names() for library, names in _LISTS.items() if prefix in ("", library)}
    found = [library for library, names in known.items() if rest in names or rest.partition(".")[0] in names]
    if len(found) == 1:
        return found[0], rest
    if found:
        raise ConfigError(f"host {name!r} exists in two libraries: say torchvision/{name} or timm/{name}")
    everything = [*SMALL_HOSTS, *(f"{library}/{n}" for library, names in known.items() for n in names)]
    near = difflib.get_close_matches(name, everything) or difflib.get_close_matches(
        rest, [n for names in known.values() for n in names]
    )
    raise ConfigError(f"unknown host {name!r}" + (f"; near names: {', '.join(near)}" if near else ""))


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


_LISTS = {"torchvision": _torchvision_names, "timm": _timm_names}


def _torchvision(name: str, config: HostConfig, num_classes: int, in_channels: int) -> nn.Module:
    from torchvision import models

    if in_channels != 3:
        raise ConfigError(f"torchvision hosts take 3 channels, the data has {in_channels}; timm hosts take any number")
    if not config.pretrained:
        return models.get_model(name, num_classes=num_classes, **config.options)
    model = models.get_model(name, weights="DEFAULT", **config.options)
    old = find_head(model)
    path = next(path for path, module in model.named_modules() if module is old)
    if isinstance(old, nn.Linear):
        _replace(model, path, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))
    elif isinstance(old, nn.Conv2d):  # over a map, pooled afterwards, as in SqueezeNet
        _replace(model, path, nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None))
    return model


def _small_stem(model: nn.Module, name: str) -> None:
    """First convolution to 3x3 with stride 1; the first max pooling goes if that convolution was a strided one."""
    path, conv = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if conv is None or conv.groups != 1:
        raise ConfigError(f"small_images: host {name!r} has no ordinary first convolution to replace")
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    _replace(model, path, new)
    if max(conv.stride) > 1:
        pool = next((n for n, m in model.named_modules() if isinstance(m, nn.MaxPool2d)), None)
        if pool is not None:
            _replace(model, pool, nn.Identity())


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _load_weights(model: nn.Module, path: Path, num_classes: int) -> None:
    """Load a state dict from a file; only the head may be missing or have another shape. No pickle is run."""
    if not path.is_file():
        raise ConfigError(f"host.weights: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        read: Callable[[Path], Any] = load_file
    else:
        read = load_tensors
    try:
        state: Any = read(path)
        state = {str(key): value.detach() for key, value in state.get("state_dict", state).items()}
    except Exception as error:  # damaged and foreign files fail in many ways
        raise ConfigError(f"host.weights: {path} holds no state dict of tensors: {error!r}") from error
    head = find_head(model)
    prefix = next(n for n, m in model.named_modules() if m is head) + "."
    own = model.state_dict()
    unfit = [
        key
        for key in {*own, *state}
        if not key.startswith(prefix) and (key not in own or key not in state or own[key].shape != state[key].shape)
    ]
    if unfit:
        raise ConfigError(
            f"host.weights: {path} does not fit {type(model).__name__}: {len(unfit)} keys are missing, foreign or of "
            f"another shape, such as {', '.join(sorted(unfit)[:3])}"
        )
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)


def host_preprocess(config: HostConfig) -> Preprocess | None:
    """How images were prepared for the host's pretrained weights: size, statistics, interpolation and crop.

    None for a host without pretrained weights, and for one whose stem was changed for small images.
    """
    if not (config.pretrained or config.weights) or config.small_images:
        return None
    library, name = resolve_host(config.name)
    if library == "own":
        return None
    if library == "timm":
        import timm

        with torch.device("meta"):  # for its data config alone
            return Preprocess.from_timm(timm.create_model(name))
    from torchvision import models

    transform = models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    crop = transform.crop_size[0]
    return Preprocess(
        image_size=crop,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        crop_pct=crop / transform.resize_size[0],
    )
