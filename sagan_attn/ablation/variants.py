"""From a spec's axes, variants and controls to the training configs they stand for."""

import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from sagan_attn.ablation.controls import BLOCK_CONTROLS, HOST_CONTROLS
from sagan_attn.ablation.hosts import deeper, wider
from sagan_attn.ablation.settings import GRAFT, OPTIONS, Settings, apply_settings, graft_of, label
from sagan_attn.ablation.spec import Spec
from sagan_attn.errors import ConfigError
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.resolve import Resolved, resolve_config

__all__ = ["Variant", "make_variants", "network_of"]

Kind = Literal["baseline", "control", "variant"]
OF_GRAFTS = ("model.grafts", "model.optimizer.graft_lr_scale", "model.optimizer.gamma_lr_scale", "graft_lr_scale")
TIMED_STEPS = 7


@dataclass(frozen=True)
class Variant:
    """One model to be trained with every seed.

    Args:
        name: unique in its spec.
        kind: what it is for.
        baseline: name of the variant it is compared with.
        settings: what the spec changes for it, in the spec's words.
        config: its training config, without seed and epochs.
        epochs_factor: on the epochs of a budget; other than 1 only for the control "longer".
    """

    name: str
    kind: Kind
    baseline: str
    settings: Settings
    config: dict[str, Any]
    epochs_factor: float = 1.0


def make_variants(spec: Spec, extra: Settings) -> list[Variant]:
    """All variants and controls of a spec, the baseline first. extra: settings for every cell beside the spec's own.

    Controls are crossed with the axes that mean something for them, such as the site, and not with single variants;
    the host alone is there for whatever is compared with it.

    Raises `ConfigError` for settings that name each other, exclude everything, or do not fit the base config.
    """
    where = str(spec.path)
    base = apply_settings(where, apply_settings(where, spec.base, spec.settings), extra)
    grid = [dict(zip(spec.axes, values, strict=True)) for values in itertools.product(*spec.axes.values())]
    if not spec.axes:
        grid = []
    kept = [point for point in grid if not any(_within(point, excluded) for excluded in spec.exclude)]
    if grid and not kept:
        raise ConfigError(f"{where}: exclude leaves nothing of the grid")
    named = [(label(point), point) for point in kept] + list(spec.variants.items())
    variants = {}
    for name, settings in named:
        if name in variants:
            raise ConfigError(f"{where}: two variants are called {name!r}")
        variants[name] = settings
    found: list[Variant] = []
    for control in spec.controls:
        points = list(variants.values()) if control == spec.baseline else kept or list(variants.values())
        found += _controls(where, base, control, points, spec.baseline)
    for name, settings in variants.items():
        if any(name == other.name for other in found):
            raise ConfigError(f"{where}: {name!r} is the name of a variant and of a control")
        kind: Kind = "baseline" if name == spec.baseline else "variant"
        baseline = label({**_of_host(settings), "block": "none"}) if spec.baseline == "none" else spec.baseline
        found.append(Variant(name, kind, baseline, settings, apply_settings(f"{where}: {name}", base, settings)))
    names = [variant.name for variant in found]
    for variant in found:
        if variant.baseline not in names:
            raise ConfigError(
                f"{where}: the baseline {variant.baseline!r} of {variant.name!r} is no variant; there are "
                + ", ".join(map(repr, names))
            )
    return sorted(found, key=lambda variant: ("baseline", "control", "variant").index(variant.kind))


def _controls(
    where: str, base: dict[str, Any], control: str, points: Sequence[Settings], baseline: str
) -> Iterable[Variant]:
    """That control for every place and way of training that a variant has, each once."""
    seen: dict[str, Variant] = {}
    for point in points:
        settings = _of_control(control, point)
        name = label(settings)
        if name in seen:
            continue
        place = f"{where}: control {name!r}"
        beside = label({**_of_host(point), "block": "none"}) if baseline == "none" else baseline
        factor = 1.0
        if control in BLOCK_CONTROLS:
            config = apply_settings(place, base, {key: value for key, value in settings.items() if key != "block"})
            graft = graft_of(place, config, "block")
            options = graft.get("options") or {}
            graft["block"] = control
            graft["options"] = {key: value for key, value in options.items() if key == "gamma_init"}
            graft.pop("pruned_heads", None)
        else:
            config = apply_settings(place, base, _of_host(point))
            config.setdefault("model", {})["grafts"] = []
            if control != "none":
                reference = apply_settings(place, base, point)
                config, factor = _changed_host(place, control, config, reference)
        kind: Kind = "baseline" if name == beside else "control"
        seen[name] = Variant(name, kind, beside, settings, config, factor)
    return seen.values()


def _of_control(control: str, point: Settings) -> dict[str, Any]:
    """What of a variant's settings means something for its control, with the control as the block."""
    if control == "none" or control == "longer":
        return {"block": control, **_of_host(point)}
    if control in HOST_CONTROLS:
        return {"block": control, **({"site": point["site"]} if "site" in point else {}), **_of_host(point)}
    own = {key for key in point if key in GRAFT or key in OPTIONS or key.startswith("options.")}
    kept = {key: value for key, value in point.items() if key not in own - {"site", "gamma_init"}}
    return {"block": control, **kept}


def _of_host(settings: Settings) -> dict[str, Any]:
    """The settings that change a host without grafts."""
    return {
        key: value
        for key, value in settings.items()
        if key not in (*GRAFT, *OPTIONS, *OF_GRAFTS, "gamma_lr_scale") and not key.startswith("options.")
    }


def _changed_host(
    where: str, control: str, config: dict[str, Any], reference: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """The host's config for "deeper", "wider" and "longer", and the factor on its epochs."""
    grafted = resolve_config(reference, where)
    if control == "longer":
        return config, step_ratio(grafted, resolve_config(config, where))
    host = grafted.model.host
    try:
        if control == "deeper":
            site = grafted.model.graft_configs[0].at
            changed = deeper(host, site if isinstance(site, str) else site[0])
        else:
            grafted.data.setup("fit")
            parameters = sum(p.numel() for p in network_of(grafted).parameters())
            changed, _ = wider(host, parameters, grafted.data.num_classes, grafted.data.in_channels)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    config["model"]["host"] = asdict(changed)
    return config, 1.0


def network_of(resolved: Resolved, grafts: Sequence[GraftConfig] | None = None) -> nn.Module:
    """The network of a config whose data are set up, on the CPU; the global random state is put back."""
    host = HostConfig(**{**asdict(resolved.model.host), "pretrained": False, "weights": None})
    grafts = resolved.model.graft_configs if grafts is None else grafts
    data = resolved.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(host, grafts, data.num_classes, data.in_channels, data.preprocess.image_size)


def step_ratio(one: Resolved, other: Resolved) -> float:
    """How many times as long a training step of one config takes as one of the other: medians of alternating steps,
    on random images, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = []
    for resolved in (one, other):
        resolved.data.setup("fit")
        network = network_of(resolved).to(device).train()
        steps.append((network, torch.optim.SGD(network.parameters(), lr=1e-6), resolved.data))
    seconds: list[list[float]] = [[], []]
    for _ in range(TIMED_STEPS):
        for (network, optimizer, data), times in zip(steps, seconds, strict=True):
            size = data.preprocess.image_size
            images = torch.randn(data.batch_size, data.in_channels, size, size, device=device)
            labels = torch.randint(0, data.num_classes, (len(images),), device=device)
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return max(1.01, statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:]))


def _within(point: Mapping[str, Any], excluded: Mapping[str, Any]) -> bool:
    return all(key in point and point[key] == value for key, value in excluded.items())
