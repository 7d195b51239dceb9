"""Checkpoints and files of weights that would run code, unpack to more than they hold, or lead a run elsewhere."""

import importlib
import io
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from canary import Canary
from small_runs import SMALL
from torch import nn

from sagan_attn.errors import CheckpointError, ConfigError
from sagan_attn.training.checkpoints import WholeFileIO
from sagan_attn.training.cli import main
from sagan_attn.training.hosts import HostConfig, build_host
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.random_state import random_state, set_random_state
from sagan_attn.training.run import RunPaths, load_run, read_checkpoint
from sagan_attn.training.tensor_files import load_tensors

WEIGHT = torch.ones(2)


class Reduced:
    """Pickled as a call, which unpickling makes; hashable, so that it can be a key."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def state(**more: Any) -> dict[str, Any]:
    return {"state_dict": {"network.a": WEIGHT}, **more}


def zipped(content: Any, path: Path) -> None:
    torch.save(content, path)


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def in_tar(content: Any, path: Path) -> None:
    """As torch wrote files before 0.1.10."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content if name == "pickle" else 0, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# name -> what is pickled, made of a call that would be noticed, and how it is written
PICKLES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Path], None]]] = {
    "all of it": (lambda call: call, zipped),
    "a weight": (lambda call: {"state_dict": {"network.a": call}}, zipped),
    "a key": (lambda call: state(more={call: 1}), zipped),
    "in a list in a tuple": (lambda call: state(more=[1, (2, [call])]), zipped),
    "in an ordered mapping": (lambda call: state(more=OrderedDict(a=[call])), zipped),
    "in the state of a callback": (lambda call: state(callbacks={"ModelCheckpoint": {"best": call}}), zipped),
    "in hyperparameters": (lambda call: state(hyper_parameters={"host": call}), zipped),
    "beside a tensor": (lambda call: state(a=WEIGHT, more=call, z=WEIGHT), zipped),
    "the old format": (lambda call: state(more=call), legacy),
    "the oldest format": (lambda call: state(more=call), in_tar),
    "no format": (lambda call: state(more=call), plain_pickle),
}


def written(case: str, canary: Canary, path: Path, name: str = "boom") -> None:
    """A file that calls a function of the canary when it is unpickled."""
    make, write = PICKLES[case]
    function = getattr(importlib.import_module(canary.module), name)
    write(make(Reduced(function, "arguments")), path)
    canary.quiet_again()


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("name", ["boom", "Bomb"])
def test_a_pickle_runs_nothing(case: str, name: str, canary: Canary, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    written(case, canary, path, name)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        read_checkpoint(path)
    assert str(error.value).count("\n") == 0
    if case not in ("the oldest format", "no format"):
        assert f"it asks for canary_in_a_mine.{name}, and only tensors and plain values are read" in str(error.value)
    with pytest.raises(ConfigError, match=f"host.weights: {re.escape(str(path))} holds no state dict"):
        build_host(HostConfig("lookup-cnn", weights=str(path)), 10)
    assert canary.sang == []
    if case == "no format":
        pickle.loads(path.read_bytes())
    elif case != "the oldest format":  # which torch reads no more in full
        torch.load(path, weights_only=False)
    if case != "the oldest format":
        assert canary.sang == sorted(["imported", "called" if name == "boom" else "made"])  # the payload is live


GLOBALS = ["posix.system", "builtins.eval", "builtins.getattr", "torch.hub.load", "runpy.run_path", "torch.load"]


@pytest.mark.parametrize("name", GLOBALS)
def test_a_name_alone_is_refused(name: str, tmp_path: Path):
    module, _, function = name.rpartition(".")
    path = tmp_path / "last.ckpt"
    torch.save(state(), path)
    rewrite(path, lambda part: b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"." if part == "data.pkl" else None)
    with pytest.raises(CheckpointError, match=rf"last.ckpt is not a .*asks for {name.removeprefix('builtins.')}, and"):
        read_checkpoint(path)


def rewrite(path: Path, change: Callable[[str], bytes | None], more: dict[str, bytes] | None = None) -> None:
    """Write an archive of torch anew: each part as `change` says, None for as it is; and parts that it did not have."""
    with zipfile.ZipFile(path) as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in parts.items():
            made = change(name.partition("/")[2])
            new.writestr(name, data if made is None else made)
        for name, data in (more or {}).items():
            new.writestr(name, data)


def test_more_parts_than_torch_writes_are_not_looked_at(canary: Canary, tmp_path: Path):
    path, outside = tmp_path / "a" / "last.ckpt", tmp_path / "outside"
    path.parent.mkdir()
    torch.save(state(), path)
    call = pickle.dumps(Reduced(importlib.import_module(canary.module).boom))
    canary.quiet_again()
    names = ("last/extra.pkl", "last/../../outside", "last/data/1", "last/code.pkl", "last/.data/x")
    rewrite(path, lambda part: None, dict.fromkeys(names, call))
    assert torch.equal(read_checkpoint(path)["state_dict"]["network.a"], WEIGHT)
    for name in ("other/data.pkl", "../outside", str(outside)):
        torch.save(state(), path)
        rewrite(path, lambda part: None, {name: call})
        with pytest.raises(CheckpointError, match=r"last.ckpt is not a whole checkpoint"):
            read_checkpoint(path)
    assert canary.sang == []
    assert not outside.exists()


def test_torchscript_is_refused(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    torch.save(state(), path)
    rewrite(path, lambda part: None, {"last/constants.pkl": b"\x80\x02).", "last/code/__torch__.py": b"import os"})
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a whole checkpoint"):
        read_checkpoint(path)


def packed(path: Path, size: int) -> None:
    """An archive of a megabyte or so whose one tensor has so many bytes."""
    with torch.serialization.skip_data():
        torch.save({"state_dict": {"network.a": torch.empty(size // 4)}}, path)
    with zipfile.ZipFile(path) as old:
        parts = [(info.filename, info.file_size) for info in old.infolist()]
        with zipfile.ZipFile(path.with_suffix(".new"), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
            for name, length in parts:
                with new.open(name, "w", force_zip64=True) as part:
                    if length < 1 << 20:
                        part.write(old.read(name))
                    else:
                        for _ in range(length >> 20):
                            part.write(bytes(1 << 20))
    path.with_suffix(".new").rename(path)


def test_what_unpacks_to_more_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "last.ckpt"
    packed(path, 1 << 28)
    assert path.stat().st_size < 1 << 21
    monkeypatch.setattr(torch, "load", None)  # not asked
    with pytest.raises(CheckpointError, match=r"last.ckpt .* compressed archive of 268,43\d,\d\d\d bytes"):
        read_checkpoint(path)
    with pytest.raises(ConfigError, match=r"host.weights: .*last.ckpt .*compressed archive"):
        build_host(HostConfig("lookup-cnn", weights=str(path)), 10)


def test_parts_that_share_their_bytes_are_refused(tmp_path: Path):
    """As in a bomb without compression, which lists one part a thousand times."""
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"network.a": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        info = archive.getinfo("last/data/0")
        for index in range(50):
            more = zipfile.ZipInfo(f"last/data/{index + 1}")
            for name in ("file_size", "compress_size", "header_offset", "CRC", "compress_type"):
                setattr(more, name, getattr(info, name))
            archive.filelist.append(more)
        archive._didModify = True
    with pytest.raises(CheckpointError, match=r"last.ckpt .* archive of 20\d,\d\d\d bytes"):
        read_checkpoint(path)


def test_storages_larger_than_the_file_are_refused(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    torch.save(state(), path)
    rewrite(path, lambda part: b"" if part == "data/0" else None)
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a whole checkpoint"):
        read_checkpoint(path)
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x02N") == 1  # the storage's two numbers
    path.write_bytes(data.replace(b"K\x02N", b"\x8a\x06\0\0\0\0\0\x10N"))  # 2**44 of them
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a whole checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
        "a text",
        None,
        [1.0],
    ],
    ids=["meta", "sparse", "text", "none", "list"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_weights_are_plain_tensors(value: Any, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"network.a": WEIGHT, "network.b": value}}, path)
    with pytest.raises(CheckpointError, match=r"last.ckpt .*'network.b' is no plain tensor"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", [7, ("network.a",), b"network.a", None])
def test_names_of_weights_are_texts(key: Any, tmp_path: Path):
    torch.save({"state_dict": {key: WEIGHT}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last.ckpt .*it holds no network"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_checkpoint_is_a_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "null.ckpt").symlink_to("/dev/zero")
    (tmp_path / "circle.ckpt").symlink_to(tmp_path / "circle.ckpt")
    for name in ("pipe", "folder", "null", "circle", "none", "a\0b", "registry:model:best", "hpc"):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            read_checkpoint(tmp_path / f"{name}.ckpt")


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> RunPaths:
    """A finished run from elsewhere."""
    shutil.copytree(small_run, tmp_path / "run")
    return RunPaths(tmp_path / "run")


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("command", ["fit", pytest.param("test", marks=pytest.mark.slow)])
def test_hyperparameters_name_no_classes(command: str, copy: RunPaths, canary: Canary, monkeypatch: pytest.MonkeyPatch):
    path = copy.checkpoint("last")
    bomb, boom = {"class_path": canary.bomb}, {"class_path": canary.boom, "init_args": {"a": 1}}
    parameters: dict[str, Any] = {"host": {"name": "lookup-cnn", "options": {"x": boom}}, "grafts": [bomb]}
    parameters |= {"optimizer": boom, "_class_path": canary.bomb, "_instantiator": canary.boom, "callbacks": [bomb]}
    parameters |= {**bomb, "init_args": {}, "label_smoothing": 0.9}
    more = {"hparams_name": "kwargs", "hparams_type": canary.bomb, "datamodule_hparams_type": canary.bomb}
    more |= {"hyper_parameters": parameters, "datamodule_hyper_parameters": parameters, "LookupData": parameters}
    changed(path, lambda content: content.update(more))
    seen = []
    monkeypatch.setattr(ClassifierModule, "on_load_checkpoint", lambda module, content: seen.append(module))
    assert main([command, *SMALL, "--run_dir", str(copy.folder), "--ckpt_path", str(path)]) == 0
    assert (seen[0].label_smoothing, seen[0].host.options) == (0.0, {})
    assert canary.sang == []


@pytest.mark.parametrize(
    "command", ["fit", *(pytest.param(one, marks=pytest.mark.slow) for one in ("test", "predict"))]
)
def test_the_command_line_refuses_a_pickle_by_name(
    command: str, copy: RunPaths, canary: Canary, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which Lightning's own loading would follow
    path = copy.checkpoint("last")
    written("in hyperparameters", canary, path)
    assert main([command, *SMALL, "--run_dir", str(copy.folder), "--ckpt_path", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path} is not a whole checkpoint of this library: it asks for canary_in_a_mine.boom" in error
    shutil.copy(path, copy.checkpoint("best"))
    with pytest.raises(CheckpointError, match=r"best.ckpt is not a whole checkpoint .* it asks for canary"):
        load_run(copy.folder)
    with pytest.raises(CheckpointError, match="asks for canary_in_a_mine"):
        WholeFileIO().load_checkpoint(path, weights_only=False)
    assert canary.sang == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resume_passes_over_a_pickle(copy: RunPaths, canary: Canary, capsys: pytest.CaptureFixture[str]):
    copy.finished.unlink()
    written("a weight", canary, copy.checkpoints / "newer.ckpt")
    assert main(["fit", *SMALL, "--run_dir", str(copy.folder), "--resume", "auto"]) == 0
    assert "passed over: " in capsys.readouterr().out
    assert canary.sang == []


def test_only_checkpoints_that_this_run_wrote_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Lightning removes what the checkpoint names as the one before, whole folders too."""
    io_plugin, folder, home = WholeFileIO(), tmp_path / "run" / "checkpoints", tmp_path / "home"
    (home / "deep.ckpt").mkdir(parents=True)
    for file in (home / "thesis.tex", home / "other.ckpt", home / "deep.ckpt" / "a"):
        file.write_text("years")
    io_plugin.save_checkpoint(state(), folder / "last.ckpt")
    io_plugin.save_checkpoint(state(), folder / "old.ckpt")
    (folder / "link.ckpt").symlink_to(home / "other.ckpt")
    (folder / "notes.txt").write_text("mine")
    for path in (
        home,
        home / "thesis.tex",
        home / "other.ckpt",
        home / "deep.ckpt",
        folder / ".." / ".." / "home",
        folder / ".." / ".." / "home" / "other.ckpt",
        folder / "link.ckpt",
        folder / "notes.txt",
        folder,
        "file://" + str(home),
        "memory://x",
        "",
        "a\0b",
    ):
        io_plugin.remove_checkpoint(path)
    assert sorted(path.name for path in home.rglob("*")) == ["a", "deep.ckpt", "other.ckpt", "thesis.tex"]
    assert (folder / "notes.txt").is_file()
    assert "not removed: " in capsys.readouterr().out
    io_plugin.remove_checkpoint(folder / "old.ckpt")
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "link.ckpt", "notes.txt"}


@pytest.mark.slow
def test_going_on_removes_nothing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole way: a checkpoint that names the user's own folder as the best one before."""
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", *SMALL, "--run_dir", "run", "--resume", "auto"]

    def stop(module: ClassifierModule) -> None:
        if module.current_epoch == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierModule, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            main(arguments)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")

    def name_another(content: dict[str, Any]) -> None:
        for key, callback in content["callbacks"].items():
            if key.startswith("ModelCheckpoint"):
                callback["best_model_path"] = callback["kth_best_model_path"] = "run/checkpoints/../../home"
                callback["best_k_models"] = {callback["best_model_path"]: torch.tensor(0.0)}

    changed(RunPaths("run").checkpoint("last"), name_another)
    assert main(arguments) == 0
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("place", [-1, 625, 10**8, 2**40])
def test_a_generators_state_is_checked(place: int):
    """NumPy takes any place in the state, and reads memory from there on."""
    before = random_state(torch.device("cpu"))
    name, keys, _, *rest = before["numpy"]
    with pytest.raises(CheckpointError, match=f"state of NumPy's generator is none: place {place}"):
        set_random_state({**before, "numpy": (name, keys, place, *rest)}, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="state of NumPy's generator is none"):
        set_random_state({**before, "numpy": (name, keys[:3], 0, *rest)}, torch.device("cpu"))
    assert np.random.get_state(legacy=True)[2] == before["numpy"][2]


def test_old_files_of_weights_are_still_read(tmp_path: Path):
    """Of hosts, from before torch wrote archives."""
    model = build_host(HostConfig("lookup-cnn"), 10)
    path = tmp_path / "old.pth"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    again = build_host(HostConfig("lookup-cnn", weights=str(path)), 10)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert load_tensors(path).keys() == model.state_dict().keys()
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(ConfigError, match=r"it asks for torch.nn.modules.linear.Linear, and only tensors"):
        build_host(HostConfig("lookup-cnn", weights=str(path)), 10)
