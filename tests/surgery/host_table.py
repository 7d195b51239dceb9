"""The hosts of `every_host.py`: the smallest model of each family, with a side of image it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import timm
import torch
import torchvision
from hosts import Host
from torch import Tensor, nn

__all__ = ["ENTRIES", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One host.

    Args:
        library: "timm", "torchvision" or "own".
        family: timm's module, torchvision's family.
        size: side of the image; of the latent map for the generator.
        options: of the model's constructor.
        at: the place to ask for, None for one that `sites` finds. Given where the graft is refused: for models without
            feature maps, whose blocks put out tokens, and for places that put out something else than one map.
    """

    library: str
    family: str
    model: str
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    at: str | None = None

    @property
    def key(self) -> str:
        return f"{self.library}/{self.model}"

    def build(self) -> nn.Module:
        """The model in eval mode, with fixed weights."""
        model = Host(self._make, (), self.size).build()
        noise = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # a head of zeros would hide what happens before it
            if parameter.dim() > 1 and not parameter.count_nonzero():
                nn.init.normal_(parameter, 0, 0.02, noise)
        return model

    def inputs(self) -> Tensor | list[Tensor]:
        """Two images, or a list of them for a detector."""
        channels = LATENT if self.library == "own" else 3
        images = torch.randn(2, channels, self.size, self.size, generator=torch.Generator().manual_seed(1))
        return list(images) if self.family in ("faster_rcnn", "retinanet") else images

    def _make(self) -> nn.Module:
        make: dict[str, Callable[..., nn.Module]] = {
            "timm": timm.create_model,
            "torchvision": torchvision.models.get_model,
            "own": lambda _, **options: Generator(),
        }
        return make[self.library](self.model, **{"num_classes": 7, **self.options})


LATENT = 32


class Generator(nn.Sequential):
    """A DCGAN generator for images of 32 x 32."""

    def __init__(self, width: int = 16) -> None:
        widths = [LATENT, 8 * width, 4 * width, 2 * width]
        layers: list[nn.Module] = []
        for step, (channels, out) in enumerate(pairwise(widths)):
            layers += [nn.ConvTranspose2d(channels, out, 4, *((2, 1) if step else (1, 0)), bias=False)]
            layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.ConvTranspose2d(2 * width, 3, 4, 2, 1), nn.Tanh())


# An untrained detector is sure of nothing: without the thresholds it puts out boxes all the same.
DETECTOR = {"weights_backbone": None, "box_score_thresh": 0.0, "rpn_score_thresh": 0.0, "min_size": 64, "max_size": 64}
RETINA = {"weights_backbone": None, "score_thresh": 0.0, "min_size": 64, "max_size": 64}

ENTRIES = [
    Entry("own", "dcgan", "generator", 1),
    Entry("torchvision", "alexnet", "alexnet"),
    Entry("torchvision", "convnext", "convnext_tiny"),
    Entry("torchvision", "densenet", "densenet121"),
    Entry("torchvision", "efficientnet", "efficientnet_b0"),
    Entry("torchvision", "efficientnet_v2", "efficientnet_v2_s"),
    Entry("torchvision", "googlenet", "googlenet", options={"init_weights": False}),
    Entry("torchvision", "inception", "inception_v3", 96, options={"init_weights": False}),
    Entry("torchvision", "maxvit", "maxvit_t", 224),
    Entry("torchvision", "mnasnet", "mnasnet0_5"),
    Entry("torchvision", "mobilenet_v2", "mobilenet_v2"),
    Entry("torchvision", "mobilenet_v3", "mobilenet_v3_small"),
    Entry("torchvision", "regnet_x", "regnet_x_400mf"),
    Entry("torchvision", "regnet_y", "regnet_y_400mf"),
    Entry("torchvision", "resnet", "resnet18"),
    Entry("torchvision", "resnext", "resnext50_32x4d"),
    Entry("torchvision", "wide_resnet", "wide_resnet50_2"),
    Entry("torchvision", "shufflenet_v2", "shufflenet_v2_x0_5"),
    Entry("torchvision", "squeezenet", "squeezenet1_1"),
    Entry("torchvision", "swin", "swin_t"),
    Entry("torchvision", "swin_v2", "swin_v2_t"),
    Entry("torchvision", "vgg", "vgg11_bn"),
    Entry("torchvision", "fcn", "fcn_resnet50", options={"weights_backbone": None}),
    Entry("torchvision", "deeplabv3", "deeplabv3_mobilenet_v3_large", options={"weights_backbone": None}),
    Entry("torchvision", "lraspp", "lraspp_mobilenet_v3_large", options={"weights_backbone": None}),
    Entry("torchvision", "faster_rcnn", "fasterrcnn_mobilenet_v3_large_320_fpn", options=DETECTOR),
    Entry("torchvision", "retinanet", "retinanet_resnet50_fpn", options=RETINA),
    Entry(
        "torchvision", "vision_transformer", "vit_b_16", options={"image_size": 64}, at="encoder.layers.encoder_layer_5"
    ),
    Entry("timm", "byoanet", "halonet_h1", 256),
    Entry("timm", "byobnet", "mobileone_s1"),
    Entry("timm", "coat", "coat_tiny", options={"img_size": 64}),
    Entry("timm", "convmixer", "convmixer_768_32"),
    Entry("timm", "convnext", "convnext_zepto_rms"),
    Entry("timm", "cpubone", "cpubone_nano"),
    Entry("timm", "csatv2", "csatv2", 128),
    Entry("timm", "cspnet", "cs3darknet_focus_s"),
    Entry("timm", "cspnext", "cspnext_tiny"),
    Entry("timm", "davit", "davit_tiny"),
    Entry("timm", "densenet", "densenet121"),
    Entry("timm", "dla", "dla46x_c"),
    Entry("timm", "dpn", "dpn48b"),
    Entry("timm", "edgenext", "edgenext_xx_small"),
    Entry("timm", "efficientformer", "efficientformer_l1", 224),
    Entry("timm", "efficientformer_v2", "efficientformerv2_s0", options={"img_size": 64}),
    Entry("timm", "efficientnet", "efficientnet_b0"),
    Entry("timm", "efficientvim", "efficientvim_m1"),
    Entry("timm", "efficientvit_mit", "efficientvit_b0"),
    Entry("timm", "efficientvit_msra", "efficientvit_m0", 128, options={"img_size": 128}),
    Entry("timm", "fasternet", "fasternet_t0"),
    Entry("timm", "fastvit", "fastvit_t8"),
    Entry("timm", "focalnet", "focalnet_tiny_srf"),
    Entry("timm", "gcvit", "gcvit_xxtiny", options={"img_size": 64}),
    Entry("timm", "ghostnet", "ghostnet_050"),
    Entry("timm", "hardcorenas", "hardcorenas_b"),
    Entry("timm", "hgnet", "hgnetv2_b0"),
    Entry("timm", "hieradet_sam2", "sam2_hiera_tiny"),
    Entry("timm", "hrnet", "hrnet_w18_small"),
    Entry("timm", "iformer", "iformer_t"),
    Entry("timm", "inception_next", "inception_next_atto"),
    Entry("timm", "inception_resnet_v2", "inception_resnet_v2", 96),
    Entry("timm", "inception_v3", "inception_v3", 96),
    Entry("timm", "inception_v4", "inception_v4", 96),
    Entry("timm", "lcnetv2", "lcnetv2_small"),
    Entry("timm", "levit", "levit_conv_128s", 224),
    Entry("timm", "lowformer", "lowformer_b0"),
    Entry("timm", "mambaout", "mambaout_femto"),
    Entry("timm", "maxxvit", "coatnet_pico_rw_224", options={"img_size": 64}),
    Entry("timm", "metaformer", "poolformerv2_s12"),
    Entry("timm", "mobilenetv3", "mobilenetv3_small_050"),
    Entry("timm", "mobilenetv5", "mobilenetv5_300m"),
    Entry("timm", "mobilevit", "mobilevit_xxs"),
    Entry("timm", "mvitv2", "mvitv2_tiny", options={"img_size": 64}),
    Entry("timm", "nasnet", "nasnetalarge", 96),
    Entry("timm", "nest", "nest_tiny", options={"img_size": 64}),
    Entry("timm", "nextvit", "nextvit_small"),
    Entry("timm", "nfnet", "nf_regnet_b0"),
    Entry("timm", "pit", "pit_ti_224", options={"img_size": 64}),
    Entry("timm", "pnasnet", "pnasnet5large", 96),
    Entry("timm", "pvt_v2", "pvt_v2_b0"),
    Entry("timm", "rdnet", "rdnet_tiny"),
    Entry("timm", "regnet", "regnetx_002"),
    Entry("timm", "repghost", "repghostnet_050"),
    Entry("timm", "repvit", "repvit_m1"),
    Entry("timm", "res2net", "res2next50"),
    Entry("timm", "resnest", "resnest14d"),
    Entry("timm", "resnet", "resnet10t"),
    Entry("timm", "resnetv2", "resnetv2_18"),
    Entry("timm", "rexnet", "rexnet_100"),
    Entry("timm", "selecsls", "selecsls42"),
    Entry("timm", "senet", "legacy_seresnet18"),
    Entry("timm", "sequencer", "sequencer2d_s", options={"img_size": 64}),
    Entry("timm", "shvit", "shvit_s1"),
    Entry("timm", "sknet", "skresnet18"),
    Entry("timm", "starnet", "starnet_s050"),
    Entry("timm", "swiftformer", "swiftformer_xs", options={"img_size": 64}),
    Entry("timm", "swin_transformer", "swin_tiny_patch4_window7_224", options={"img_size": 64, "window_size": 2}),
    Entry("timm", "swin_transformer_v2", "swinv2_tiny_window8_256", options={"img_size": 64, "window_size": 2}),
    Entry("timm", "swin_transformer_v2_cr", "swinv2_cr_tiny_224", options={"img_size": 64, "window_size": 2}),
    Entry("timm", "tiny_vit", "tiny_vit_5m_224"),
    Entry("timm", "tresnet", "tresnet_m"),
    Entry("timm", "twins", "twins_svt_small", options={"img_size": 64}),
    Entry("timm", "vgg", "vgg11"),
    Entry("timm", "visformer", "visformer_tiny", options={"img_size": 64}),
    Entry("timm", "vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", options={"img_size": 64}),
    Entry(
        "timm",
        "vision_transformer_sam",
        "samvit_base_patch16_224",
        options={"img_size": 64, "depth": 3, "global_attn_indexes": (2,)},
    ),
    Entry("timm", "vitamin", "vitamin_small_224", options={"img_size": 64}),
    Entry("timm", "volo", "volo_d1_224", options={"img_size": 64}),
    Entry("timm", "vovnet", "ese_vovnet19b_slim_dw"),
    Entry("timm", "xception", "legacy_xception"),
    Entry("timm", "xception_aligned", "xception41p"),
    Entry("timm", "beit", "beit_base_patch16_224", options={"img_size": 64, "depth": 2}, at="blocks.1"),
    Entry("timm", "cait", "cait_xxs24_224", options={"img_size": 64, "depth": 2}, at="blocks.1"),
    Entry("timm", "convit", "convit_tiny", options={"img_size": 64}, at="blocks.5"),
    Entry("timm", "crossvit", "crossvit_tiny_240", 240, at="blocks.1"),
    Entry("timm", "deepseek_vit", "deepseek_vit_412m", 84, options={"depth": 2}, at="encoder.blocks.1"),
    Entry("timm", "deit", "deit_tiny_patch16_224", options={"img_size": 64}, at="blocks.5"),
    Entry("timm", "eva", "vit_tiny_patch16_dinov3_qkvb", options={"img_size": 64}, at="blocks.5"),
    Entry("timm", "gemma4_vit", "gemma4_vit_167m", 96, options={"depth": 2}, at="encoder.blocks.1"),
    Entry("timm", "hiera", "hiera_tiny_224", 224, at="blocks.5"),
    Entry("timm", "mlp_mixer", "gmlp_ti16_224", options={"img_size": 64}, at="blocks.5"),
    Entry("timm", "naflexvit", "naflexvit_so150m2_patch16_reg1_gap", 96, options={"depth": 2}, at="blocks.1"),
    Entry("timm", "qwen3_vit", "qwen3_vit_88m", 96, options={"depth": 2}, at="encoder.blocks.1"),
    Entry("timm", "tnt", "tnt_s_patch16_224", options={"img_size": 64}, at="blocks.5"),
    Entry("timm", "vision_transformer", "vit_dwee_patch16_reg1_gap_256", options={"img_size": 64}, at="blocks.5"),
    Entry(
        "timm", "vision_transformer_relpos", "vit_srelpos_small_patch16_224", options={"img_size": 64}, at="blocks.5"
    ),
    Entry("timm", "xcit", "xcit_nano_12_p16_224", options={"img_size": 64}, at="blocks.5"),
    Entry("torchvision", "resnet", "resnet50", at="layer3.0.relu"),
    Entry("timm", "densenet", "densenetblur121d", at="features.denseblock2"),
    Entry("timm", "hrnet", "hrnet_w18_small_v2", at="stage3"),
    Entry("timm", "efficientvim", "efficientvim_m1_dist", at="stages.1"),
]
