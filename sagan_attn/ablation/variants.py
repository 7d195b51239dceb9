"""From a spec's axes, variants and controls to the training configs they stand for."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sagan_attn.ablation.controls import BLOCK_CONTROLS, HOST_CONTROLS
from sagan_attn.ablation.hosts import deeper, wider
from sagan_attn.ablation.models import Models, Size
from sagan_attn.ablation.settings import GRAFT, OPTIONS, RATES, Settings, apply_settings, graft_of, label
from sagan_attn.ablation.spec import Spec
from sagan_attn.ablation.timing import step_ratio
from sagan_attn.errors import ConfigError, SaganAttnError

__all__ = ["Variant", "make_variants"]

Kind = Literal["baseline", "control", "variant"]
OF_GRAFTS = {"model.grafts"} | {key for name in ("graft_lr_scale", "gamma_lr_scale") for key in (name, RATES[name])}
KEPT_OPTIONS = {name: ("gamma_init",) for name in BLOCK_CONTROLS} | {
    name: ("gamma_init", "reduction") for name in ("identity", "context-mean", "context-max")
}
SAME_SIZE = 0.02  # parameters of a control and of what it stands for differ by at most so much


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
        note: what a reader has to know of it.
        of: of a control, the names of the variants it stands beside; () for one that stands beside all.
    """

    name: str
    kind: Kind
    baseline: str
    settings: Settings
    config: dict[str, Any]
    epochs_factor: float = 1.0
    note: str = ""
    of: tuple[str, ...] = ()


@dataclass
class _Maker:
    """Makes the variants of one spec; grid: its points, by name, which controls are crossed with."""

    spec: Spec
    base: dict[str, Any]
    models: Models
    grid: Mapping[str, Settings]
    sizes: dict[str, Size] = field(default_factory=dict)

    def variant(self, name: str, settings: Settings) -> Variant:
        config = apply_settings(self.where(name), self.base, settings)
        grafts = config.get("model", {}).get("grafts") or []
        only_controls = bool(grafts) and all(str(graft.get("block")) in BLOCK_CONTROLS for graft in grafts)
        kind: Kind = "baseline" if name == self.spec.baseline else "control" if only_controls else "variant"
        return Variant(name, kind, self.baseline_of(settings), settings, config)

    def controls(self, control: str, points: Mapping[str, Settings]) -> Iterator[Variant]:
        """That control for every place and way of training that a variant has, each once."""
        groups: dict[str, dict[str, Settings]] = {}
        for name, point in points.items():
            groups.setdefault(json.dumps(_of_control(control, point), default=str), {})[name] = point
        for group in groups.values():
            settings = _of_control(control, next(iter(group.values())))
            if control == "conv":
                yield from self._convs(settings, group)
            elif control in BLOCK_CONTROLS:
                yield replace(self._block(control, settings, {}), of=tuple(group))
            elif control == "none":
                yield self._host(control, settings, group)
            else:
                yield replace(self._host(control, settings, group), of=tuple(group))

    def _convs(self, settings: dict[str, Any], group: Mapping[str, Settings]) -> Iterator[Variant]:
        """One for each number of parameters among the variants of a group."""
        made: dict[int, list[str]] = {}
        for name, point in group.items():
            count = self.size(name, point).of_grafts // max(1, self.places(name, point))
            same = next((other for other in made if abs(count - other) <= SAME_SIZE * other), count)
            made.setdefault(same, []).append(name)
        for count, names in made.items():
            like = {} if count == next(iter(made)) else {"like": group[names[0]].get("block", names[0])}
            yield replace(self._block("conv", {**settings, **like}, {"parameters": count}), of=tuple(names))

    def _block(self, control: str, settings: dict[str, Any], options: dict[str, Any]) -> Variant:
        name = label(settings)
        own = {key: value for key, value in settings.items() if key not in ("block", "like")}
        config = apply_settings(self.where(name), self.base, own)
        graft = graft_of(self.where(name), config, "block")
        kept = {key: v for key, v in (graft.get("options") or {}).items() if key in KEPT_OPTIONS[control]}
        graft |= {"block": control, "options": {**kept, **options}}
        graft.pop("pruned_heads", None)
        return self._control(name, self.baseline_of(own), settings, config)

    def _host(self, control: str, settings: dict[str, Any], group: Mapping[str, Settings]) -> Variant:
        name = label(settings)
        point = next(iter(group.values()))
        config = apply_settings(self.where(name), self.base, _of_host(point))
        config.setdefault("model", {})["grafts"] = []
        factor, note = 1.0, ""
        if control != "none":
            sizes = {one: self.size(one, point) for one, point in group.items()}
            of = max(sizes, key=lambda one: sizes[one].flops if control == "longer" else sizes[one].parameters)
            grafted = self.models.resolve(apply_settings(self.where(of), self.base, group[of]), self.where(of))
            try:
                if control == "longer":
                    factor = step_ratio(grafted, self.models.resolve(config, self.where(name)))
                    note = f"{factor:.2f} times the epochs, rounded up, for the time of {of}"
                elif control == "deeper":
                    site = grafted.model.graft_configs[0].at
                    host = deeper(grafted.model.host, site if isinstance(site, str) else site[0])
                    config["model"]["host"] = asdict(host)
                else:
                    data = grafted.data
                    target = sizes[of].parameters
                    host, off = wider(grafted.model.host, target, data.num_classes, data.in_channels)
                    config["model"]["host"] = asdict(host)
                    note = f"{100 * off:+.1f} % of the parameters of {of}"
            except ConfigError as error:
                raise ConfigError(f"{self.where(name)}: {error}") from error
        return self._control(name, self.baseline_of(point), settings, config, factor, note)

    def size(self, name: str, point: Settings) -> Size:
        if name not in self.sizes:
            config = apply_settings(self.where(name), self.base, point)
            try:
                self.sizes[name] = self.models.size(self.models.resolve(config, self.where(name)))
            except SaganAttnError as error:
                named = str(error).startswith(self.where(name))
                raise error if named else type(error)(f"{self.where(name)}: {error}") from error
        return self.sizes[name]

    def places(self, name: str, point: Settings) -> int:
        return len(self.size(name, point).grafts)

    def where(self, name: str) -> str:
        return f"{self.spec.path}: {name}"

    def _control(self, name: str, baseline: str, settings: Settings, config: dict[str, Any], *how: Any) -> Variant:
        return Variant(name, "baseline" if name == baseline else "control", baseline, settings, config, *how)

    def baseline_of(self, settings: Settings) -> str:
        if self.spec.baseline != "none":
            return self.spec.baseline
        return label({"block": "none", **_of_host(settings)})


def make_variants(spec: Spec, extra: Settings, models: Models) -> list[Variant]:
    """All variants and controls of a spec, the baseline first. extra: settings for every cell beside the spec's own.

    Controls are crossed with the axes that mean something for them, such as the site, and not with single variants;
    the host alone is there for whatever is compared with it. A block of the controls is one on an axis, too.

    Raises `ConfigError` for settings that name each other, exclude everything, or do not fit the base config.
    """
    where = str(spec.path)
    base = apply_settings(where, apply_settings(where, spec.base, spec.settings), extra)
    points = [dict(zip(spec.axes, values, strict=True)) for values in itertools.product(*spec.axes.values())]
    points = points if spec.axes else []
    kept = [point for point in points if not any(_within(point, excluded) for excluded in spec.exclude)]
    if points and not kept:
        raise ConfigError(f"{where}: exclude leaves nothing of the grid")
    named: dict[str, Settings] = {}
    for name, settings in [(label(point), point) for point in kept] + list(spec.variants.items()):
        if name in named:
            raise ConfigError(f"{where}: two variants are called {name!r}")
        named[name] = settings
    grid = {name: named[name] for name in map(label, kept)} or named
    maker = _Maker(spec, base, models, grid)
    found = [maker.variant(name, settings) for name, settings in named.items()]
    for control in spec.controls:
        found += maker.controls(control, named if control == spec.baseline else grid)
    names = [variant.name for variant in found]
    for variant in found:
        if names.count(variant.name) > 1:
            raise ConfigError(f"{where}: {variant.name!r} is the name of two variants or controls")
        if variant.baseline not in names:
            raise ConfigError(
                f"{where}: the baseline {variant.baseline!r} of {variant.name!r} is no variant; there are "
                + ", ".join(map(repr, names))
            )
    return sorted(found, key=lambda variant: ("baseline", "control", "variant").index(variant.kind))


def _of_control(control: str, point: Settings) -> dict[str, Any]:
    """What of a variant's settings means something for its control, with the control as the block."""
    host = _of_host(point)
    if control in ("none", "longer"):
        return {"block": control, **host}
    if control in HOST_CONTROLS:
        return {"block": control, **({"site": point["site"]} if "site" in point else {}), **host}
    kept = {"site", *KEPT_OPTIONS[control]}
    own = {key for key in point if key in GRAFT or key in OPTIONS or key.startswith("options.")} - kept
    return {"block": control, **{key: value for key, value in point.items() if key not in own}}


def _of_host(settings: Settings) -> dict[str, Any]:
    """The settings that change a host without grafts."""
    return {
        key: value
        for key, value in settings.items()
        if key not in {*GRAFT, *OPTIONS, *OF_GRAFTS} and not key.startswith("options.")
    }


def _within(point: Mapping[str, Any], excluded: Mapping[str, Any]) -> bool:
    return all(key in point and point[key] == value for key, value in excluded.items())
