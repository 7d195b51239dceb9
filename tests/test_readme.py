"""Every code block of the README works, and says the same as the configs and the CI script."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

from sagan_attn.__main__ import COMMANDS as PACKAGE_COMMANDS
from sagan_attn.blocks import block_names
from sagan_attn.training.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python" and "onnxruntime" not in code]  # tests/export's
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]


def test_there_are_examples():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 5
    assert {language for language, _ in BLOCKS} == {"python", "bash", "yaml"}


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_example(code, request, tmp_path, monkeypatch):
    create = timm.create_model
    # The tests have no network; surgery does not depend on what the weights are.
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    monkeypatch.chdir(tmp_path)
    if "runs/my-run" in code:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "my-run").symlink_to(request.getfixturevalue("small_run"))
        Image.new("RGB", (60, 50)).save("photo.jpg")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py")])
def test_training_commands_parse(command, request, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[2:]
    run = request.getfixturevalue("small_run")
    arguments = [str(run / "config.yaml") if re.fullmatch("runs/.*/config.yaml", one) else one for one in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    assert "host:" in capsys.readouterr().out


def test_the_ablation_is_the_shipped_one():
    (text,) = [code for language, code in BLOCKS if language == "yaml"]
    shipped = yaml.safe_load((ROOT / "configs" / "ablation" / "cifar10.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(text) == {key: value for key, value in shipped.items() if key != "expected_sd"}


def test_commands_of_the_package_exist():
    used = {shlex.split(line)[3] for line in COMMANDS if line.startswith("python -m sagan_attn")}
    assert used == set(PACKAGE_COMMANDS)


def test_the_two_commands_are_those_of_ci():
    assert COMMANDS[:2] == ["pip install . && python train.py", 'pip install ".[test]" && pytest']
    assert 'pip install --quiet ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_config_and_block_is_in_the_readme():
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} == set(
        re.findall(r"^\| `(\S+\.yaml)`", TEXT, re.M)
    )
    for name in block_names():
        assert f"`{name}`" in TEXT


def test_the_measured_tables_are_those_of_the_files():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    start, end = tables.MARKS
    assert TEXT.split(start)[1].split(end)[0].strip() == tables.measured().strip()


def test_files_are_there():
    for path in re.findall(r"`((?:benchmarks|configs)/[\w.]+)`", TEXT):
        assert (ROOT / path).is_file(), path


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((\S+?)\)", TEXT):
        assert (ROOT / path).is_file()
