"""Promise 1 and 4 under autocast and in channels_last: the numbers, the dtypes and the strides a host has alone."""

from typing import Any

import pytest
import torch
from hosts import ANY_HOST, assert_same
from roads import FOUR, grafted, mostly_slow
from torch import Tensor, nn

from sagan_attn.surgery.point import CHILD

HOSTS_HERE = mostly_slow(("tiny", *FOUR, "regnet", "swin"), "tiny", "convnext", "efficientnet", "mambaout")


def activations(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """What each module of the host puts out, call by call; the last entry, "", is the output."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:  # a clone, as the next module may work in place
        return lambda _, args, out: seen.setdefault(name, []).append(out.clone()) if isinstance(out, Tensor) else None

    own = [(name, module) for name, module in model.named_modules() if CHILD not in name.split(".")]
    hooks = [module.register_forward_hook(keep(name)) for name, module in own]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def assert_all_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert list(found) == list(expected)
    for name, maps in expected.items():
        assert_same(found[name], maps)


def forms(found: dict[str, list[Tensor]]) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [(x.dtype, x.shape, x.stride()) for x in maps] for name, maps in found.items()}


@pytest.mark.parametrize("name", HOSTS_HERE)
def test_autocast_sees_the_same_activations_and_dtypes(name: str):
    bare = ANY_HOST[name].build()
    host = grafted(name, gate=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = activations(bare, host.images)
        found = activations(host.model, host.images)
    assert any(x.dtype == torch.bfloat16 for maps in expected.values() for x in maps)
    assert_all_same(found, expected)
    assert host.runs() == host.once
    with torch.no_grad():
        for gamma in host.grafts.gammas().values():
            gamma.fill_(0.7)
    with torch.autocast("cpu", torch.bfloat16):
        changed = activations(host.model, host.images)
    assert forms(changed) == forms(expected)
    assert not torch.equal(changed[""][0], expected[""][0])


@pytest.mark.parametrize("name", HOSTS_HERE)
def test_channels_last_keeps_its_strides(name: str):
    last = torch.channels_last
    bare = ANY_HOST[name].build().to(memory_format=last)
    host = grafted(name, gate=0.0)
    host.model.to(memory_format=last)
    images = host.images.to(memory_format=last)
    expected = activations(bare, images)
    # a site of an NHWC host is contiguous as it is
    layout = torch.contiguous_format if name in ("mambaout", "swin") else last
    assert all(expected[site][0].is_contiguous(memory_format=layout) for site in ANY_HOST[name].sites)
    assert_all_same(activations(host.model, images), expected)
    assert host.runs() == host.once
    with torch.no_grad():
        for gamma in host.grafts.gammas().values():
            gamma.fill_(0.7)
    changed = activations(host.model, images)
    assert forms(changed) == forms(expected)
    host.model.to(memory_format=torch.contiguous_format)
    plain = host.model(host.images)  # the same model on plain maps
    torch.testing.assert_close(changed[""][0], plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain, host.original)
