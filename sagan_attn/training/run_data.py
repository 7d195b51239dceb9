"""The data that a run was trained on, from its config."""

from sagan_attn.errors import ConfigError, DataError
from sagan_attn.training import data as sets
from sagan_attn.training.class_paths import check_config
from sagan_attn.training.data.sources import Pictures
from sagan_attn.training.run import Run

__all__ = ["data_of", "pictures_of_test"]


def data_of(run: Run) -> sets.ImageData:
    """The data module of a run, not set up. Raises `ConfigError` for a config that names no data of this library."""
    try:
        config = run.config["data"]
        name, options = str(config["class_path"]).rsplit(".", 1)[-1], dict(config.get("init_args") or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the config of {run.folder} names no data: give image files instead") from error
    kind = getattr(sets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, sets.ImageData)):
        raise ConfigError(f"data {name!r} of {run.folder} are not of this library: give image files instead")
    check_config({"data": config}, str(run.folder / "config.yaml"), hint="give image files instead")
    try:
        if options.get("augment"):
            options["augment"] = sets.AugmentConfig(**options["augment"])
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"the config of {run.folder} does not fit {name}: {error}") from error


def pictures_of_test(run: Run) -> Pictures:
    """The test split of a run's data. Raises `ConfigError` or `DataError` where it cannot be had."""
    pictures = data_of(run).given_pictures("test")
    if (most := max(int(label) for label in pictures.labels)) >= len(run.classes):
        raise DataError(f"the data of {run.folder} have a class {most}, and classes.json names {len(run.classes)}")
    return pictures
