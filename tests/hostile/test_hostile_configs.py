"""Configs in a run folder, which jsonargparse would import from and call: refused by file, key and name."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from canary import Canary
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from small_runs import CONFIGS

from sagan_attn.ablation.spec import read_spec
from sagan_attn.errors import ConfigError
from sagan_attn.training.class_paths import ALLOWED, DATASETS, MAPPINGS, SECTIONS, check_config, check_file, travels
from sagan_attn.training.cli import KEPT, main
from sagan_attn.training.resolve import _Resolver

Edit = Callable[[dict[str, Any], Canary], None]


def config() -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "strategy": "auto", "callbacks": None, "devices": "auto"},
        "model": {
            "host": {"name": "lookup-cnn", "options": {}},
            "grafts": [{"at": "local", "options": {"heads": 1}}],
            "optimizer": {"name": "adamw", "options": {}},
            "schedule": {"name": "cosine"},
        },
        "data": {"class_path": "sagan_attn.training.data.LookupData", "init_args": {"n_train": 64, "n_test": 8}},
        "run_dir": "runs/a: b",
    }


def put(place: str, value: Any) -> Edit:
    """Sets a dotted place; a value that is a function gets the canary."""

    def edit(content: dict[str, Any], canary: Canary) -> None:
        *parents, last = place.split("/")
        for parent in parents:
            content = content[parent]
        content[last] = value(canary) if callable(value) else value

    return edit


def bomb(canary: Canary) -> dict[str, Any]:
    return {"class_path": canary.bomb}


def boom(canary: Canary) -> dict[str, Any]:
    return {"class_path": canary.boom}


def lambda_callback(canary: Canary) -> list[Any]:
    return [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": canary.boom}}]


def data(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


# name -> edit, the key that is named, and whether the same file given from elsewhere, as the user's own word, does run
# or import the canary: those show that the payload is live
CASES: dict[str, tuple[Edit, str, bool]] = {
    "a callback": (put("trainer/callbacks", lambda c: [bomb(c)]), "trainer.callbacks.0.class_path", True),
    "a callback alone": (put("trainer/callbacks", bomb), "trainer.callbacks.class_path", True),
    "a callback by its path": (put("trainer/callbacks", lambda c: [c.bomb]), "trainer.callbacks.0", True),
    "a path for the callbacks": (put("trainer/callbacks", lambda c: c.bomb), "trainer.callbacks", True),
    "a callable's path": (put("trainer/callbacks", lambda_callback), "trainer.callbacks.0.class_path", True),
    "a callback by its name": (put("trainer/callbacks", ["LambdaCallback"]), "trainer.callbacks.0", False),
    "a logger": (put("trainer/logger", lambda c: [boom(c)]), "trainer.logger.0.class_path", True),
    "a strategy": (put("trainer/strategy", bomb), "trainer.strategy.class_path", True),
    "a profiler's path": (put("trainer/profiler", lambda c: c.bomb), "trainer.profiler", True),
    "an accelerator's path": (put("trainer/accelerator", lambda c: c.bomb), "trainer.accelerator", False),
    "a plugin's path": (put("trainer/plugins", lambda c: c.bomb), "trainer.plugins", True),
    "plugins": (put("trainer/plugins", lambda c: [bomb(c)]), "trainer.plugins.0.class_path", True),
    "data by their path": (put("data", lambda c: c.bomb), "data must be a mapping", True),
    "data of another class": (put("data", boom), "data.class_path", True),
    "a data set's path": (
        put("data", lambda c: data("TorchvisionData", dataset=c.bomb)),
        "data.init_args.dataset",
        True,
    ),
    "a data set that unpickles": (
        put("data", data("TorchvisionData", dataset="torchvision.datasets.LSUN")),
        "data.init_args.dataset",
        False,
    ),
    "in an option of the host": (put("model/host/options", lambda c: {"x": bomb(c)}), "host.options.x", True),
    "in a list of an option": (put("model/host/options", lambda c: {"x": [1, bomb(c)]}), "host.options.x.1", True),
    "in an option of a graft": (put("model/grafts", lambda c: [{"at": "a", "options": bomb(c)}]), "grafts.0", False),
    "in an option of the optimizer": (
        put("model/optimizer/options", lambda c: {"x": {"y": bomb(c)}}),
        "model.optimizer.options.x.y.class_path",
        True,
    ),
    "the host as a class": (put("model/host", bomb), "model.host.class_path", True),
    "the optimizer as a class": (put("model/optimizer", boom), "model.optimizer.class_path", True),
    "the model as a class": (put("model/class_path", lambda c: c.bomb), "model.class_path", False),
    "the augmentation as a class": (put("data/init_args/augment", bomb), "augment.class_path", True),
    "JSON inside of a text": (
        put("model/host/options", lambda c: {"x": json.dumps(bomb(c))}),
        "model.host.options.x",
        True,
    ),
    "YAML inside of a text": (
        put("model/host/options", lambda c: {"x": f"class_path: {c.bomb}"}),
        "model.host.options.x",
        True,
    ),
    "YAML in a text in a text": (
        put("model/host/options", lambda c: {"x": json.dumps({"a": json.dumps(bomb(c))})}),
        "model.host.options.x",
        False,
    ),
    "a class path with escapes": (
        put("model/host/options", lambda c: {"x": '{"class\\u005fpath": "' + c.bomb + '"}'}),
        "model.host.options.x",
        True,
    ),
    "a section inside of a text": (put("trainer", lambda c: json.dumps({"callbacks": [bomb(c)]})), "trainer", True),
    "data inside of a text": (put("data", lambda c: json.dumps(bomb(c))), "data", True),
    "arguments of an earlier class": (
        put("data", lambda c: {"init_args": {"dataset": c.bomb}}),
        "data.class_path names None",
        False,
    ),
    "more than arguments": (
        put("data", {"class_path": "LookupData", "dict_kwargs": {"a": 1}}),
        "data.dict_kwargs",
        False,
    ),
    "an argument that writes": (
        put(
            "trainer/callbacks",
            [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "/etc"}}],
        ),
        "trainer.callbacks.0.init_args.dirpath",
        False,
    ),
    "an argument that imports": (
        put(
            "trainer/callbacks",
            lambda c: [{"class_path": "EMAWeightAveraging", "init_args": {"device": c.bomb}}],
        ),
        "trainer.callbacks.0.init_args.device",
        True,
    ),
    "an address to load from": (
        put("model/host/options", {"pretrained_cfg": {"url": "file:///tmp/evil.pth"}}),
        "model.host.options.pretrained_cfg is",
        False,
    ),
    "a file to load": (
        put("model/host/options", {"checkpoint_path": "evil.pth"}),
        "model.host.options.checkpoint_path is",
        False,
    ),
    "a registry to send to": (put("trainer/model_registry", "their/model"), "trainer.model_registry is", False),
    "a dotted key": (
        put("model/host.options", lambda c: {"x": bomb(c)}),
        "model has a key 'host.options', which is no name",
        True,
    ),
    "a key that appends": (put("trainer/callbacks+", lambda c: [bomb(c)]), "has a key 'callbacks+'", False),
    "another config": (put("config", "other.yaml"), "config is no part", False),
    "a subcommand's section": (put("fit", {"trainer": {}}), "fit is no part", False),
    "a hidden key": (put("data/__path__", "/etc/passwd"), "data has a key '__path__'", False),
    "torch.hub": (
        put("data", data("torch.hub.load", repo_or_dir="a/b", model="c")),
        "data.class_path names 'torch.hub.load'",
        False,
    ),
    "a class of torch": (put("trainer/logger", data("torch.nn.Linear")), "trainer.logger.class_path", False),
    "a number for a class": (put("data/class_path", 7), "data.class_path names 7", False),
    "a long text": (put("run_dir", "x" * 3000), "run_dir is a text of 3,000 characters", False),
}


def refused(path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        _Resolver(["fit", "--config", str(path)])
    assert str(path) in str(error.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder like that of a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    return folder


def test_what_fit_writes_is_taken(run: Path, small_run: Path):
    (run / "config.yaml").write_text(yaml.safe_dump(config()))
    assert _Resolver(["fit", "--config", str(run / "config.yaml")]).options.run_dir == "runs/a: b"
    assert travels(small_run / "config.yaml")
    check_file(small_run / "config.yaml")


@pytest.mark.parametrize("case", CASES)
def test_a_config_of_a_run_cannot_name_code(case: str, run: Path, canary: Canary):
    edit, named, _ = CASES[case]
    content = config()
    edit(content, canary)
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    refused(run / "config.yaml", re.escape(named))
    assert canary.sang == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, (_, _, live) in CASES.items() if live])
def test_elsewhere_it_is_the_users_own_word(case: str, canary: Canary, tmp_path: Path):
    """And is imported: the payload is live."""
    content = config()
    CASES[case][0](content, canary)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    with suppress(Exception):  # of whatever does not fit there, once it was imported
        _Resolver(["fit", "--config", str(tmp_path / "own.yaml")]).resolved()
    assert canary.sang


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("data: !!python/object/apply:canary_in_a_mine.boom []", "cannot be read .*could not determine a constructor"),
        ("data: !!python/name:canary_in_a_mine.boom", "cannot be read"),
        ("data: !!python/module:canary_in_a_mine", "cannot be read"),
        ("? !!python/object/new:canary_in_a_mine.Bomb []\n: 1", "cannot be read"),
        ("data: [", "cannot be read"),
        ("- 1", r"the config must be a mapping, not \[1\]"),
        ("7", "must be a mapping, not 7"),
        ("data: " + "[" * 600, "cannot be read .*RecursionError|cannot be read .*recursion"),
        ("data: " + "{a: " * 600, "cannot be read"),
        ("data: " + "- " * 600, "cannot be read"),
        ("model: " + "[" * 60 + "]" * 60, "model must be a mapping"),
        ("run_dir: " + "[" * 60 + "]" * 60, "run_dir has more than 20,000 values or 40 levels"),
        ("#" + "x" * 1_000_001, "has more than 1,000,000 bytes"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)  # fmt: skip
def test_hostile_yaml(text: str | bytes, match: str, run: Path, canary: Canary):
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run / "config.yaml", match)
    assert canary.sang == []


def test_a_bomb_of_aliases_is_not_blown_up(run: Path):
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]  # 9 ** 12 values
    (run / "config.yaml").write_text("\n".join([*lines, "seed_everything: *a11"]))
    refused(run / "config.yaml", "a0 is no part")
    (run / "config.yaml").write_text("run_dir:\n" + "\n".join(f" {line}" for line in lines))
    refused(run / "config.yaml", "run_dir has more than 20,000 values")
    arguments = "\n".join(f"   {line}" for line in lines)
    (run / "config.yaml").write_text(f"data:\n  class_path: LookupData\n  init_args:\n{arguments}")
    refused(run / "config.yaml", "data has more than 20,000 values")
    for text in ("data:\n -\n{}", "trainer:\n -\n{}", "model:\n grafts:\n{}", "model:\n host:\n -\n{}"):
        (run / "config.yaml").write_text(text.format("\n".join(f"  {line}" for line in lines)))
        refused(run / "config.yaml", "must be a (mapping|list), not ")  # and says what there is in some words


def test_a_file_named_like_a_value_is_not_read(canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For `strategy: auto`, the default, jsonargparse would read a file `auto` in the working directory."""
    monkeypatch.chdir(tmp_path)
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": canary.boom}}
    for name in ("auto", "cpu"):
        (tmp_path / name).write_text(yaml.safe_dump(strategy))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config()))
    trainer = _Resolver(["fit", "--config", "own.yaml"]).options.trainer
    assert (trainer.strategy, trainer.accelerator) == ("auto", "cpu")
    assert canary.sang == []
    theirs = LightningArgumentParser()
    theirs.add_lightning_class_args(Trainer, "trainer")
    theirs.parse_args([])
    assert canary.sang == ["imported"]  # Lightning's own parser does: the payload is live


@pytest.mark.parametrize("place", ["model/host", "model/optimizer", "model/schedule", "data/init_args/augment"])
@pytest.mark.parametrize("value", ["part.yaml", "https://example.invalid/part.yaml", ["part.yaml"]])
def test_parts_are_not_read_from_other_files(place: str, value: Any, run: Path, canary: Canary):
    content = config()
    put(place, value)(content, canary)
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    (run / "part.yaml").write_text(
        yaml.safe_dump({"name": "lookup-cnn", "options": {"x": {"class_path": canary.bomb}}})
    )
    refused(run / "config.yaml", "must be a mapping, not")
    assert canary.sang == []


def test_variables_of_the_environment_are_not_filled_in(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_EPOCHS", "7")
    (run / "config.yaml").write_text(yaml.safe_dump(config() | {"run_dir": "${oc.env:HOME}"}))
    options = _Resolver(["fit", "--config", str(run / "config.yaml")]).options
    assert (options.run_dir, options.trainer.max_epochs) == ("${oc.env:HOME}", 1)


FORMS = ["{c} --config {p}", "{c} -c={p}", "--config {p} {c}", "{c} --config own.yaml --config {p}"]
FORMS_OF = [pytest.param(c, form, marks=pytest.mark.slow) for c in ("fit", "validate", "test") for form in FORMS]


@pytest.mark.parametrize(("command", "form"), [("predict", FORMS[0]), *FORMS_OF])
def test_the_command_line_refuses(command: str, form: str, run: Path, canary: Canary, capsys: Any, monkeypatch: Any):
    content = config()
    monkeypatch.chdir(run.parent)
    (run.parent / "own.yaml").write_text(yaml.safe_dump(content))
    content["trainer"]["callbacks"] = lambda_callback(canary)
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(form.format(c=command, p=path).split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: trainer.callbacks.0.class_path names 'lightning.pytorch.callbacks.LambdaCallback'" in error
    assert "copy it elsewhere and give the copy with --config" in error
    assert canary.sang == []


def test_where_a_config_travels(tmp_path: Path):
    def made(name: str, *beside: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a: 1")
        for other in beside:
            (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / other).touch()
        return path

    assert not travels(made("own/config.yaml"))
    assert not travels(made("project/train.yaml", "project/checkpoints/mine.ckpt", "project/metrics.csv"))
    for marks in (
        "environment.json",
        "classes.json",
        "transform.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    ):
        folder = f"run-{marks.partition('.')[0].replace('/', '-')}"
        assert travels(made(f"{folder}/config.yaml", f"{folder}/{marks}"))
        assert travels(made(f"{folder}/evil.yaml"))
        assert travels(made(f"{folder}/checkpoints/evil.yaml"))
    assert travels(made("abl/cells/0123456789abcdef/config.yaml", "abl/plan.json"))
    assert travels(made("abl/evil.yaml"))
    assert travels(made("copied/cells/0123456789abcdef/config.yaml", "copied/cells/0123456789abcdef/attempts"))
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "abl" / "evil.yaml")
    assert travels(link)
    into = tmp_path / "run-environment" / "link.yaml"
    into.symlink_to(tmp_path / "own" / "config.yaml")
    assert travels(into)


def test_the_base_of_a_spec_may_lie_in_a_run(run: Path, canary: Canary, tmp_path: Path):
    content = yaml.safe_load((CONFIGS / "lookup.yaml").read_text())
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump({"base": "run/config.yaml", "axes": {"block": ["sagan", "biggan"]}}))
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert read_spec(spec).base == content
    content["trainer"]["callbacks"] = [bomb(canary)]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"config.yaml: trainer.callbacks.0.class_path names 'canary"):
        read_spec(spec)
    assert canary.sang == []


@pytest.mark.slow
@pytest.mark.parametrize("path", ALLOWED)
def test_the_list_is_of_classes_that_take_no_callables(path: str):
    """By jsonargparse's reading of their signatures. What takes one must be left out, what a part must be a mapping."""
    parser = LightningArgumentParser()
    parser.add_class_arguments(resolve_name(path), "one", fail_untyped=False)
    hints = {one.dest: str(one._typehint) for one in parser._actions if hasattr(one, "_typehint")}
    for place, hint in hints.items():
        name = place.split(".")[1]
        if name not in (*ALLOWED[path], *MAPPINGS):
            classes = set(re.findall(r"[\w.]+\.[\w.]+", hint)) | {*re.findall(r"Callable|\b[Tt]ype\b|Any", hint)}
            assert classes <= PLAIN, (place, hint)


PLAIN = {"typing.Union", "datetime.timedelta", "typing.Optional", "typing.Literal", "pathlib.Path", "typing.Any", "Any"}


def test_the_list_holds_every_class_that_is_documented():
    root = Path(__file__).parents[2]
    texts = [path.read_text() for path in [root / "README.md", *root.glob("configs/**/*.yaml")]]
    texts += [path.read_text() for path in (root / "sagan_attn").rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"class_path: ([\w.]+)", text)}
    known = {*ALLOWED, *(path.rpartition(".")[2] for path in ALLOWED)}
    assert {name for name in named if name != "..."} <= known
    assert len(named) > 5


def test_the_sections_are_those_that_fit_keeps():
    assert set(KEPT) == set(SECTIONS)


def test_data_sets_are_those_of_torchvision():
    from torchvision import datasets

    assert {name.rpartition(".")[2] for name in DATASETS} <= set(datasets.__all__)
    check_config({"data": data("TorchvisionData", dataset="torchvision.datasets.SVHN")}, "x")
