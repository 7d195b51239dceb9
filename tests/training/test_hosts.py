"""Hosts by name."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from sagan_attn.errors import ConfigError
from sagan_attn.training.hosts import HostConfig, build_host, find_head, host_preprocess


@pytest.mark.parametrize(
    "name", ["lookup-cnn", "resnet9", "resnet20", "torchvision/resnet18", "timm/resnet10t", "convnext_atto"]
)
def test_host_has_as_many_outputs_as_classes(name):
    model = build_host(HostConfig(name), num_classes=7)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 7)
    assert find_head(model).weight.shape[0] == 7


def test_resnet20_has_the_parameters_of_the_paper():
    # 269,722 with zero-padded shortcuts, plus two projections with their norms
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    model = build_host(HostConfig("resnet20"), num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 269_722 + projections


def test_resnet9_is_that_of_cifar10_fast():
    model = build_host(HostConfig("resnet9"), num_classes=10)
    shapes = {}
    for site in ("stem", "layer1", "layer2", "layer3"):
        model.get_submodule(site).register_forward_hook(
            lambda module, args, output, site=site: shapes.update({site: tuple(output.shape[1:])})
        )
    model(torch.rand(2, 3, 32, 32))
    assert shapes == {"stem": (64, 32, 32), "layer1": (128, 16, 16), "layer2": (256, 8, 8), "layer3": (512, 4, 4)}
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    expected = sum(9 * i * o + 2 * o for i, o in convolutions) + 512 * 10
    assert sum(p.numel() for p in model.parameters()) == expected
    residual = model.layer1.residual
    x = torch.rand(2, 128, 16, 16)
    assert torch.equal(residual.eval()(x), x + residual[1](residual[0](x)))


def test_resnet9_options():
    model = build_host(HostConfig("resnet9", options={"width": 8, "stem_stride": 2}), num_classes=10)
    assert model.stem(torch.rand(1, 3, 32, 32)).shape == (1, 8, 16, 16)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert model.head.in_features == 64


def test_lookup_host_sees_12_pixels_only():
    features = build_host(HostConfig("lookup-cnn"), num_classes=10)[:4].eval()
    image = torch.rand(1, 3, 48, 48, requires_grad=True)
    features(image)[0, :, 5, 5].sum().backward()
    seen = image.grad[0].abs().sum(dim=0).nonzero()
    low, high = seen.min(dim=0).values, seen.max(dim=0).values
    assert (high - low + 1).tolist() == [12, 12]


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18", "timm/convnext_atto", "timm/resnet10t"])
def test_small_images_keep_their_size_in_the_stem(name):
    model = build_host(HostConfig(name, small_images=True), num_classes=10)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    sizes = []
    first.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(32, 32)]
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())


@pytest.mark.slow
def test_small_images_leave_a_stride_1_host_its_pooling():
    before = torchvision.models.vgg11(num_classes=10)
    after = build_host(HostConfig("torchvision/vgg11", small_images=True), num_classes=10)
    count = [sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) for model in (before, after)]
    assert count == [5, 5]


def test_local_weights_load_without_the_head(tmp_path):
    source = timm.create_model("resnet10t", num_classes=5)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = build_host(HostConfig("timm/resnet10t", weights=str(tmp_path / "weights.safetensors")), num_classes=3)
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    assert model.fc.weight.shape == (3, 512)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pt")
    model = build_host(HostConfig("timm/resnet10t", weights=str(tmp_path / "weights.pt")), num_classes=5)
    assert torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HostConfig("resnet18"), "say torchvision/resnet18 or timm/resnet18"),
        (HostConfig("timm/convnext_ato"), "unknown host 'timm/convnext_ato'; near names: .*convnext_atto"),
        (HostConfig("keras/resnet18"), "must be torchvision or timm"),
        (HostConfig("lookup-cnn", pretrained=True), "has no pretrained weights"),
        (HostConfig("timm/resnet10t", pretrained=True, weights="x.pt"), "pretrained does not go with weights"),
        (HostConfig("timm/resnet10t", weights="nowhere.pt"), "there is no file nowhere.pt"),
        (HostConfig("timm/resnet10t", options={"widht": 3}), "is refused: .*widht"),
        (HostConfig("resnet20", options={"depth": 3}), "has the options blocks, width, got depth"),
        (HostConfig("resnet9", options={"depth": 3}), "has the options width, stem_stride, blocks, got depth"),
        (HostConfig("resnet9", options={"width": 0}), r"host.options.width \(0\) must be a whole number of at least 1"),
        (HostConfig("resnet9", options={"stem_stride": 3}), r"host.options.stem_stride \(3\) must be 1 or 2"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ConfigError, match=message):
        build_host(config, num_classes=10)


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit ResNet: \d+ keys"):
        build_host(HostConfig("timm/resnet10t", weights=str(tmp_path / "other.safetensors")), num_classes=10)


def test_pretrained_without_a_network_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"cannot be had \(no route to host\); download them once"):
        build_host(HostConfig("timm/resnet10t", pretrained=True), num_classes=10)


def test_a_pretrained_torchvision_host_gets_a_new_head(monkeypatch):
    original = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights=None, **options: original(name, **options)
    )
    model = build_host(HostConfig("torchvision/resnet18", pretrained=True), num_classes=4)
    assert model.fc.out_features == 4
    model = build_host(HostConfig("torchvision/squeezenet1_1", pretrained=True), num_classes=4)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 4)


def test_preprocessing_is_that_of_the_pretrained_weights():
    preprocess = host_preprocess(HostConfig("timm/resnet50.a1_in1k", pretrained=True))
    assert (preprocess.image_size, preprocess.interpolation, preprocess.crop_pct) == (224, "bicubic", 0.95)
    preprocess = host_preprocess(HostConfig("torchvision/resnet18", pretrained=True))
    assert (preprocess.image_size, preprocess.interpolation, preprocess.crop_pct) == (224, "bilinear", 224 / 256)
    assert host_preprocess(HostConfig("torchvision/resnet18")) is None
