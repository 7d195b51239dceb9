"""Training configs, the shipped ones changed: they resolve, or a message says which key is wrong."""

from pathlib import Path
from typing import Any

import torch
import yaml
from fuzzing import answer, fuzzed, json_values, wild
from hypothesis import strategies as st
from mappings import mutated

from sagan_attn.errors import SaganAttnError
from sagan_attn.training.resolve import resolve_config

CONFIGS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (Path(__file__).parents[2] / "configs").glob("*.yaml")
}
NAMES = (
    "trainer model data host grafts optimizer schedule class_path init_args name options augment callbacks logger "
    "max_epochs precision devices at block lr compile seed"
)
KEYS = st.sampled_from(NAMES.split())
VALUES = st.sampled_from(
    [
        *("lookup-cnn", "resnet20", "timm/resnet18", "torchvision/resnet18", "torchvision/", "timm/no", "a/b/c"),
        *("LookupData", "CIFARData", "FolderData", "sagan_attn.training.data.LookupData", "lightning.Trainer"),
        *("sagan_attn.training.attention_log.AttentionLog", "torch.nn.Linear", "no.such.Class", "lightning"),
        *("sagan", "cosine", "onecycle", "adamw", "sgd", "bf16-mixed", "cpu", "reduce-overhead", "max-autotune"),
        *([0, 1], [[]], {"width": 8}, {"class_path": "LookupData"}, {"class_path": None}, {"init_args": {}}),
        *({"at": "local"}, [{"at": "local"}], [{"at": ["local", 1]}], {"crop_padding": 4}, {"cutout": -1}, [None]),
        *(1.5, -1, 0, 1, 10**30, float("nan"), float("inf"), True, None, "3", "true", "null", "[1", "{a: 1}", "1e3"),
    ]
)


@fuzzed(700, few=6, name=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_a_changed_config_resolves_or_is_refused(name: str, data: Any):
    config = data.draw(mutated(CONFIGS[name], VALUES, KEYS))
    random = torch.get_rng_state()
    resolved = answer(lambda: resolve_config(config, "this config"), "this config")
    assert torch.equal(torch.get_rng_state(), random)
    if not isinstance(resolved, SaganAttnError):
        assert set(resolved.config) == {"seed_everything", "trainer", "model", "data"}, (config, resolved.config)
        again = resolve_config(resolved.config, "the resolved config")
        assert repr(again.config) == repr(resolved.config)  # as text, in which NaN is NaN


@fuzzed(150, few=6, config=json_values | st.dictionaries(KEYS, VALUES | json_values, max_size=4) | wild)
def test_what_is_no_config(config: Any):
    answer(lambda: resolve_config(config, "this config"), "this config")
