"""A number that is not finite in the branch of a block reaches the output, though the gate on the branch is 0."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from block_forms import CASES, NAMES, Case
from torch import Tensor, nn

from sagan_attn import functional, graft, grafts_of
from sagan_attn.errors import BlockError
from sagan_attn.functional.paths import Path
from sagan_attn.surgery import fuse

IMAGES = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
OTHER_PATHS = ("materialised", "chunked", "factored", "sdpa", "sdpa_padded")  # for "fused" see tests/kernels
GATES = ("output", "norm", "linear2")  # what a branch ends with that starts at 0, besides gamma


def hosted(case: Case, path: str | None = None) -> nn.Module | None:
    """A host with a fresh graft of that kind; None where the path cannot serve it."""
    host = nn.Sequential(nn.Conv2d(8, 8, 1))
    options = case.options if path is None else {**case.options, "path": path}
    try:
        graft(host, "0", block=case.name, example_input=IMAGES, options=options)
    except BlockError:
        return None
    return host


@contextmanager
def spoiled(model: nn.Module, tensor: Tensor, bad: float) -> Iterator[None]:
    """Inside, one place of one tensor of the model holds a bad number; afterwards all is as it was."""
    before = [(one, one.detach().clone()) for one in (tensor, *model.buffers())]
    with torch.no_grad():
        tensor.view(-1)[-1] = bad
        yield
        for one, value in before:
            one.copy_(value)


def branch_parameters(model: nn.Module) -> dict[str, Tensor]:
    own = dict(grafts_of(model).named_parameters())
    return {name: p for name, p in own.items() if p.requires_grad and not name.endswith("gamma")}


def with_open_gate(model: nn.Module) -> nn.Module:
    """The same weights with a branch that counts: whether that gives finite numbers is what the formula says."""
    twin = copy.deepcopy(model)
    for name, parameter in grafts_of(twin).named_parameters():
        parts = name.split(".")
        if (parts[-1] == "gamma" or parts[-2] in GATES) and not parameter.count_nonzero():
            parameter.fill_(0.5)
    return twin


def is_finite(model: nn.Module, training: bool = False) -> bool:
    return bool(model.train(training)(IMAGES).isfinite().all())


def check_nan(model: nn.Module) -> None:
    for name, parameter in branch_parameters(model).items():
        with spoiled(model, parameter, math.nan):
            assert not is_finite(fuse(model)), name
            assert not is_finite(model), name
            assert not is_finite(model, training=True), name
        assert is_finite(model)


@pytest.mark.parametrize("case", NAMES, ids=str)
def test_every_weight_of_every_block(case: Case):
    """In train and eval mode, and after `fuse`."""
    model = hosted(case)
    assert model is not None
    check_nan(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.identity], ids=str)
def test_every_path(case: Case):
    served = 0
    for path in OTHER_PATHS:
        model = hosted(case, path)
        if model is not None:
            check_nan(model)
            served += 1
    assert served >= 2 or not case.attends


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.identity], ids=str)
def test_infinite_numbers(case: Case):
    """The gate hides none that the formula itself does not bound, by a tanh, a sigmoid or the 0 of a ReLU."""
    reached = 0
    for path in (None, "materialised", "chunked"):  # torch's kernels take scores that are all -inf for masked ones
        model = hosted(case, path)
        for name, parameter in branch_parameters(model).items() if model is not None else ():
            for bad in (math.inf, -math.inf):
                with spoiled(model, parameter, bad):
                    for training in (True, False):
                        finite = is_finite(with_open_gate(model), training)
                        assert is_finite(copy.deepcopy(model), training) == finite, (path, name, bad)
                    assert is_finite(fuse(model)) == finite, (path, name, bad)
                    reached += not finite
    assert reached or case.name == "se"  # where all goes through a sigmoid


@pytest.mark.parametrize("name", ["nonlocal", "biggan"])
def test_statistics_and_singular_vectors(name: str):
    model = hosted(Case(name, name))
    assert model is not None
    floats = {key: buffer for key, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert floats
    for key, buffer in floats.items():
        with spoiled(model, buffer, math.nan):
            assert not is_finite(fuse(model)), key
            assert not is_finite(model), key


def test_a_gate_around_any_block():
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    graft(model, "0", block=lambda channels: nn.Conv2d(channels, channels, 1), gate=True, example_input=IMAGES)
    for parameter in grafts_of(model).parameters():  # the gate's own too
        with spoiled(model, parameter, math.nan):
            assert not is_finite(model)
            assert not is_finite(fuse(model))
    assert len(grafts_of(fuse(model))) == 0


@pytest.mark.parametrize("path", ["sdpa", "sdpa_padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_keys(path: Path, dtype: torch.dtype):
    """torch's fused kernel gives 0 for scores that are all NaN where there are few keys."""
    query = torch.randn(1, 1, 5, 8, dtype=dtype)
    for keys in (*range(1, 18), 63, 64, 65, 513):
        clean, value = torch.randn(2, 1, 1, keys, 8, dtype=dtype)
        spoiled = clean.clone()
        spoiled[..., 0] = math.nan
        with torch.no_grad():
            assert functional.attend(query, spoiled, value, path=path).isnan().all(), keys
            found = functional.attend(query, clean, value, path=path)
        expected = (query.double() @ clean.double().mT).softmax(-1) @ value.double()
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sagan", "biggan", "nonlocal", "context-max", "se", "gc"])
def test_compiled(name: str):
    model = hosted(Case(name, name))
    assert model is not None
    compiled = torch.compile(model.eval())
    with torch.no_grad():
        assert compiled(IMAGES).isfinite().all()
    for key, parameter in branch_parameters(model).items():
        with spoiled(model, parameter, math.nan):
            assert not compiled(IMAGES).isfinite().all(), key
