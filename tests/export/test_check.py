"""What counts as the same as the model, and what is said of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from sagan_attn.errors import ConfigError, SaganAttnError
from sagan_attn.export.check import check_random, check_real, check_weights, sizes_to_try

SIZES = [(9, 12), (10, 11), (16, 16)]


class Model(nn.Module):
    """Logits [B, 3]: means of the channels, times ten."""

    def forward(self, images: Tensor) -> Tensor:
        return 10 * images.mean((2, 3))


def test_what_is_found_out():
    seen = []

    def exported(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return Model()(images) + torch.tensor([0.0, 2e-4, -1e-4])

    found = check_random(Model(), exported, 8, SIZES)
    assert seen == [(1, 3, 8, 8), (2, 3, 8, 8), (7, 3, 8, 8), (1, 3, 9, 12), (2, 3, 10, 11), (1, 3, 16, 16)]
    assert found.images == 14
    assert found.shapes == ["1x3x8x8", "2x3x8x8", "7x3x8x8", "1x3x9x12", "2x3x10x11", "1x3x16x16"]
    assert found.logits == pytest.approx(2e-4, rel=1e-2)
    assert 0 < found.probabilities < 2e-4
    assert found.changed == 0
    assert len(check_random(Model(), exported, 8, []).shapes) == 3


def test_real_images_and_classes_that_change():
    images = torch.zeros(20, 3, 2, 2)
    images[:5, 1] = 1e-5  # class 1 by a little
    images[5:, 0] = 1
    found = check_real(Model(), lambda images: Model()(images) + torch.tensor([2e-4, 0.0, 0.0]), images)
    assert (found.images, found.changed, found.shapes) == (20, 5, ["16x3x2x2", "4x3x2x2"])
    assert found.largest_logit == 10


def test_logits_may_differ_by_a_part_of_the_largest():
    images = torch.full((1, 3, 2, 2), 5.0)
    check_real(Model(), lambda images: Model()(images) + 0.04, images)  # of 50
    with pytest.raises(
        SaganAttnError, match=r"differs from the model by 0.06 in logits of up to 50 .* allowed is 0.001"
    ):
        check_real(Model(), lambda images: Model()(images) + 0.06, images)
    with pytest.raises(SaganAttnError, match="differs"):  # as far, and another distribution
        check_real(Model(), lambda images: Model()(images) + torch.tensor([0.04, 0, 0]), images)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda logits: logits + math.nan, "differs from the model by nan"),
        (lambda logits: logits[:, :2], r"gives torch.float32 \[1, 2\] for images 1x3x8x8, the model .* \[1, 3\]"),
        (lambda logits: logits.double(), r"gives torch.float64"),
        (lambda logits: logits.view(5), "the export fails for images 1x3x8x8: .*shape"),
    ],
)
def test_what_is_refused(wrong, match: str):
    with pytest.raises(SaganAttnError, match=match) as error:
        check_random(Model(), lambda images: wrong(Model()(images)), 8, [])
    assert "--fixed-size" not in str(error.value)
    with pytest.raises(SaganAttnError, match="--fixed-size may do"):
        check_random(Model(), lambda images: wrong(Model()(images)), 8, SIZES)


def test_a_difference_at_another_size_alone_is_seen():
    def exported(images: Tensor) -> Tensor:
        return Model()(images) + (0.1 if images.shape[3] == 11 else 0)

    check_random(Model(), exported, 8, [])
    with pytest.raises(SaganAttnError, match=r"2x3x10x11.*--fixed-size may do"):
        check_random(Model(), exported, 8, SIZES)


def test_a_model_that_is_not_finite():
    with pytest.raises(SaganAttnError, match="the model gives numbers that are not finite"):
        check_real(Model(), Model(), torch.full((1, 3, 2, 2), math.inf))


class Even(Model):
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % 2 or images.shape[3] % 2:
            raise RuntimeError("even sides are required")
        return super().forward(images)


class Eight(Model):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (8, 8), "eight\nor nothing"
        return super().forward(images)


def test_sizes_that_a_model_takes():
    assert sizes_to_try(Model(), 8) == (SIZES, [])
    assert sizes_to_try(Even(), 8) == ([(16, 16)], [(9, 12), (10, 11)])
    with pytest.raises(ConfigError, match=r"no images of another size than 8 x 8 \(eight\); use --fixed-size"):
        sizes_to_try(Eight(), 8)


def test_weights_are_compared_bit_for_bit():
    one, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    for model in (one, other):
        model.weight.data[0] = math.nan
    check_weights(one, other)
    other.running_mean[1] = -0.0
    with pytest.raises(SaganAttnError, match="running_mean of the export has other numbers"):
        check_weights(one, other)
    with pytest.raises(SaganAttnError, match="other numbers"):
        check_weights(nn.BatchNorm2d(2), nn.BatchNorm2d(2).double())
    with pytest.raises(SaganAttnError, match=r"other names: \['bias'\]"):
        check_weights(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
