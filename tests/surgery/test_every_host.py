"""The promises on every host of `host_table.py`; with export and compile in the slow run."""

import pytest
import torch
from every_host import EXTRA, PROMISES, check
from host_table import ENTRIES, Entry
from hosts import count_calls
from torch import Tensor, nn

from sagan_attn import graft
from sagan_attn.errors import GraftError

SPREAD = {  # grouped, shuffled, NHWC, strided outputs, dict of outputs, generator, tokens
    "own/generator",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "timm/convnext_zepto_rms",
    "timm/efficientvit_b0",
    "timm/mambaout_femto",
    "timm/regnetx_002",
    "timm/xcit_nano_12_p16_224",
}


def test_the_table_names_each_host_once():
    keys = [entry.key for entry in ENTRIES]
    assert len(set(keys)) == len(keys)
    assert set(keys) >= SPREAD


@pytest.mark.filterwarnings("ignore")  # of timm and torch about themselves
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.key) for e in ENTRIES if e.key in SPREAD])
def test_promises(entry: Entry):
    assert_kept(entry, deep=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of timm and torch about themselves
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.key) for e in ENTRIES])
def test_every_promise(entry: Entry):
    assert_kept(entry, deep=True)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Dense(nn.Sequential):
    """As in RDNet and VoVNet."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for module in self:
            maps.append(module(maps[-1]))
        return torch.cat(maps, 1)


def test_a_sequential_with_a_forward_of_its_own():
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(Residual(nn.Conv2d(3, 3, 1), nn.ReLU()), Dense(nn.Conv2d(3, 3, 1)), nn.Conv2d(6, 3, 1))
    expected = model(x)
    with pytest.raises(GraftError, match="module '1' is a Dense, a container that may call each of its children"):
        graft(model, "1", example_input=x)
    calls = count_calls(graft(model, "0", example_input=x)[0].block)
    assert torch.equal(model(x), expected)
    assert len(calls) == 1


def assert_kept(entry: Entry, deep: bool) -> None:
    row = check(entry, deep)
    if entry.at is not None:
        assert row["refusal"].startswith(f"module '{entry.at}' ")
        return
    assert {name: row[name] for name in PROMISES} == dict.fromkeys(PROMISES, True)
    if deep:
        assert all(row[kind] for kind in EXTRA), row  # True, or "host" where the host alone fails too
