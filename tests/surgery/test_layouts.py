"""Maps with C = H = W, whose layout their shape does not tell."""

import timm
import torch
from torch import Tensor, nn

from sagan_attn import graft, sites


def square(model: nn.Module, image: int, side: int) -> dict[str, str]:
    """Name -> layout of the places whose map is side x side with as many channels."""
    found = sites(model.eval(), torch.zeros(2, 3, image, image))
    return {site.name: site.layout for site in found if {site.channels, site.height, site.width} == {side}}


def test_a_channels_last_model():
    options = {"embed_dim": 16, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "window_size": 2}
    found = square(timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **options), 64, 16)
    # the class at other sizes tells; patch_embed is alone in its class and follows its norm; a convolution is known
    assert {"patch_embed", "patch_embed.norm", "layers.0", "layers.0.blocks.0", "patch_embed.proj"} <= found.keys()
    assert {name for name, layout in found.items() if layout == "NCHW"} == {"patch_embed.proj"}


def test_a_model_with_both_layouts_inside():
    model = timm.create_model("convnext_tiny", dims=(16, 24, 32, 40), depths=(1, 1, 1, 1))
    found = square(model, 64, 16)
    assert {name for name, layout in found.items() if layout == "NHWC"} == {
        f"stages.0.blocks.0.{name}" for name in ("norm", "mlp", "mlp.fc2", "mlp.drop2")
    }
    assert found["stages.0"] == found["stages.0.blocks.0"] == found["stem"] == "NCHW"


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 3)


def test_no_evidence_and_contradicting_evidence_are_channels_first():
    assert square(nn.Sequential(Swap()), 3, 3) == {"0": "NCHW"}
    there_and_back = [nn.Conv2d(3, 8, 1), Swap(), Swap(), nn.Conv2d(8, 8, 2, 2), Swap()]
    assert square(nn.Sequential(*there_and_back), 8, 8)["1"] == "NHWC"  # as its class at 4 x 4
    assert square(nn.Sequential(*there_and_back, Swap()), 8, 8)["1"] == "NCHW"


def test_the_graft_takes_the_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2, 2), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    grafts = graft(model, "2", example_input=x)
    assert grafts[0].point.layout == "NCHW"
    assert torch.equal(model(x), expected)
