"""A config is what it says: null too, and what is kept of a run is read back as the same."""

from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from small_runs import CONFIGS

from sagan_attn.errors import ConfigError
from sagan_attn.training.resolve import resolve_config


def config(**changes: Any) -> dict[str, Any]:
    """The lookup config, with some values in other places."""
    content = yaml.safe_load((CONFIGS / "lookup.yaml").read_text())
    for key, value in changes.items():
        section: Any = content
        *path, name = key.split("__")
        for part in path:
            section = section[int(part) if part.isdigit() else part]
        section[name] = value
    return content


@pytest.mark.parametrize(
    "place",
    [
        *(
            "seed_everything",
            "trainer__num_nodes",
            "model__optimizer__lr",
            "model__schedule__name",
            "model__freeze_host",
        ),
        *("model__host__name", "model__grafts__0__at", "model__grafts__0__block"),
        *("data__class_path", "data__init_args__drop_last", "data__init_args__seed"),
    ],
)
def test_null_is_refused_where_a_value_is_required(place: str):
    with pytest.raises(ConfigError, match=rf"a config: .*{place.split('__')[0]}.*"):
        resolve_config(config(**{place: None}), "a config")


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("section", ["trainer", "model", "data"])
def test_sections_of_a_config(section: str, value: Any):
    """A trainer has defaults for everything; a host and data have none."""
    content = config()
    del content[section]
    if value is None:
        content[section] = None
    if section == "trainer" and value is ...:
        assert resolve_config(content, "a config").config["trainer"]["accumulate_grad_batches"] == 1
        return
    with pytest.raises(ConfigError, match=rf"a config: .*{section}.*"):
        resolve_config(content, "a config")


def test_null_is_kept_where_it_is_not_the_default():
    """Lightning: validate after so many batches, not epochs."""
    given = config(trainer__check_val_every_n_epoch=None, trainer__val_check_interval=10)
    resolved = resolve_config(given, "a config").config
    assert resolved["trainer"]["check_val_every_n_epoch"] is None
    assert resolve_config(resolved, "itself").config == resolved
    assert "precision" not in resolved["trainer"]  # null by default


def test_other_parsers_of_the_process_are_as_they_were():
    resolve_config(config(), "a config")
    assert ArgumentParser().add_argument("--x").default is None
