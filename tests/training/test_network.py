"""Grafts from a config: heads taken out before training."""

import copy

import pytest
import torch
from small_runs import SMALL

from sagan_attn import grafts_of, prune_heads
from sagan_attn.errors import GraftError
from sagan_attn.training import load_run
from sagan_attn.training.cli import main
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.network import GraftConfig, build_network

HOST = HostConfig("resnet20", options={"width": 8, "blocks": [1, 1, 1]})


def network(*grafts: GraftConfig) -> torch.nn.Module:
    torch.manual_seed(2)
    return build_network(HOST, grafts, num_classes=5, in_channels=3, image_size=16)


def test_pruned_heads_are_those_of_prune_heads():
    whole = network(GraftConfig(["layer2", "layer3"], "multihead"))
    pruned = network(GraftConfig(["layer2", "layer3"], "multihead", pruned_heads=[0, 3]))
    expected = copy.deepcopy(whole)
    prune_heads(expected, {graft: [0, 3] for graft in grafts_of(expected)})
    assert list(pruned.state_dict()) == list(expected.state_dict()) == list(whole.state_dict())
    for one, other in zip(pruned.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [graft.block.heads for graft in grafts_of(pruned)] == [2, 2]
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(pruned.eval()(images), network().eval()(images))


@pytest.mark.parametrize(
    ("block", "heads", "options", "message"),
    [
        ("multihead", [4], {}, r"pruned_heads \(\[4\]\) at 'layer2': head 4 of 'layer2.*' must be .* from 0 to 3"),
        ("multihead", [], {}, r"pruned_heads \(\[\]\) at 'layer2': heads of 'layer2.*' is empty"),
        ("multihead", [0, 1, 2, 3], {}, r"pruned_heads .* has 4 heads, and all would go"),
        ("multihead", [1, 1], {}, r"pruned_heads .* name one twice"),
        ("sagan", [0], {"heads": 2, "reduction": 2}, "pruned_heads .* no output convolution"),
        ("biggan", [0], {}, "pruned_heads .* spectral norms"),
        ("decoder", [0], {}, "pruned_heads .* several attentions"),
        ("context-max", [0], {}, "pruned_heads .* has no heads to remove"),
        ("identity", [0], {}, "pruned_heads .* has no heads to remove"),
    ],
)
def test_heads_that_cannot_go_are_named(block, heads, options, message):
    with pytest.raises(GraftError, match=message):
        network(GraftConfig("layer2", block, options=options, pruned_heads=heads))


@pytest.mark.slow
def test_a_run_with_pruned_heads_comes_back(tmp_path):
    run_dir = tmp_path / "run"
    small = ["--data.n_train=64", "--data.n_val=32", "--trainer.max_epochs=1", "--model.schedule.warmup_epochs=0"]
    grafts = '[{"at": "local", "block": "multihead", "pruned_heads": [1, 2]}]'
    assert main(["fit", *SMALL, *small, "--model.grafts", grafts, "--run_dir", str(run_dir)]) == 0
    run = load_run(run_dir)
    (graft,) = grafts_of(run.model)
    assert graft.block.heads == 2
    assert graft.block.query.weight.shape == (64, 128, 1, 1)
    assert run.config["model"]["grafts"][0]["pruned_heads"] == [1, 2]


def test_configs_of_older_runs_have_no_pruned_heads():
    assert (
        GraftConfig(**{"at": "layer2", "block": "sagan", "name": None, "seed": None, "options": {}}).pruned_heads
        is None
    )
