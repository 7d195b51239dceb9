"""HubGrafts: folders and repositories of grafts. Nothing here reaches a network."""

import copy
import dataclasses
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hosts import assert_same, assert_unchanged, snapshot
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from huggingface_hub.errors import EntryNotFoundError
from stored import HOST, IMAGE, Shift, assert_same_state, fresh_like, grafted
from torch import Tensor, nn

import sagan_attn
from sagan_attn import HubGrafts, graft, grafts_of, is_grafted, save_grafts, ungraft
from sagan_attn.errors import GraftError
from sagan_attn.surgery import hub

FILES = ["README.md", "grafts.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "attn"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where repositories are: in a folder each."""
    root = tmp_path / "remote"

    def create_repo(api: HfApi, repo_id: str, **_: Any) -> Any:
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(api: HfApi, *, repo_id: str, folder_path: Path, commit_message: str, **_: Any) -> str:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"{repo_id}: {commit_message}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return root


def cached(cache: Path, repository: Path, commit: str = "0" * 40) -> Path:
    """A cache of the Hub that holds a repository "user/name"."""
    place = cache / "models--user--name"
    shutil.copytree(repository, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return cache


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(
    name: str | Path, message: str, error: type[Exception] = GraftError, model: Any = None, **options: Any
) -> None:
    model = HOST.build().train() if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=message):
        HubGrafts.from_pretrained(name, model=model, example_input=IMAGE, **options)
    assert_unchanged(model, before)


# what comes back


def test_round_trip_of_a_folder(folder: Path):
    model = grafted({"stage": "biggan", "top": {"block": "nonlocal", "reduction": 4}})
    handle = HubGrafts(model)
    assert handle.save_pretrained(folder / "new") is None
    assert names_in(folder / "new") == FILES
    alone = folder / "alone.safetensors"
    save_grafts(model, alone)
    assert (folder / "new" / "grafts.safetensors").read_bytes() == alone.read_bytes()
    fresh = fresh_like(model)
    loaded = HubGrafts.from_pretrained(folder / "new", model=fresh, example_input=IMAGE)
    assert loaded.model is fresh
    assert [graft.path for graft in loaded.grafts] == [graft.path for graft in grafts_of(model)]
    assert_same_state(fresh, model)
    assert_same(fresh(HOST.images()), model(HOST.images()))


def test_round_trip_of_a_repository(folder: Path, remote: Path):
    model = grafted("top", block=Shift, gate=False)
    assert HubGrafts(model).push_to_hub("user/name", commit_message="first") == "user/name: first"
    assert names_in(remote / "user" / "name") == FILES
    cache = cached(folder, remote / "user" / "name")
    for name, options in [(str(remote / "user" / "name"), {}), ("user/name", {"cache_dir": cache})]:
        fresh = fresh_like(model)
        HubGrafts.from_pretrained(
            name, model=fresh, example_input=IMAGE, blocks={"shift": Shift}, local_files_only=True, **options
        )
        assert_same_state(fresh, model)
        assert_same(fresh(HOST.images()), model(HOST.images()))


def test_what_the_download_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    HubGrafts(grafted("top")).save_pretrained(folder)
    asked: list[Any] = []
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *args, **options: asked.append((args, options)) or folder / hub.FILE
    )
    options = {
        "force_download": True,
        "token": "secret",
        "cache_dir": folder,
        "local_files_only": True,
        "revision": "v2",
    }
    HubGrafts.from_pretrained("user/name", model=HOST.build(), example_input=IMAGE, **options)
    assert asked == [(("user/name", "grafts.safetensors"), options)]  # no config.json


def test_saving_and_pushing_at_once(folder: Path, remote: Path):
    handle = HubGrafts(grafted("top"))
    message = "Push model using huggingface_hub."
    assert handle.save_pretrained(folder, push_to_hub=True, private=True) == f"attn: {message}"
    assert handle.save_pretrained(folder, push_to_hub=True, repo_id="user/name") == f"user/name: {message}"
    assert names_in(folder) == names_in(remote / "attn") == names_in(remote / "user" / "name") == FILES


def test_grafts_are_those_the_model_has(folder: Path):
    model = grafted(["stage", "top"])
    handle = HubGrafts(model)
    assert handle.model is model
    ungraft(model, "stage")
    assert [graft.site for graft in handle.grafts] == ["top"]
    assert copy.deepcopy(handle).model is not model


def test_the_card(folder: Path):
    model = grafted({"stage": {"block": "nonlocal", "name": "nl"}, "top": {"block": Shift, "gate": False}})
    HubGrafts(model).save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {"library_name": "sagan_attn", "tags": ["model_hub_mixin", "sagan_attn"]}
    assert "# Grafts for Tiny\n" in card.text
    assert "|---|---|---|---|\n| `stage` | `nl` | `nonlocal` | " in card.text
    assert "\n| `top` | `shift` | `stored.Shift` | 0 |\n\nTo put them" in card.text
    assert """from_pretrained("<user>/<name>", model=model, blocks={'shift': ...})\n""" in card.text
    assert "{{" not in card.content


def test_the_card_is_written_once_and_takes_values(folder: Path):
    handle = HubGrafts(grafted("top"))
    handle.save_pretrained(folder, model_card_kwargs={"host": "my network"})
    assert "# Grafts for my network\n" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    handle.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_other_files_of_the_folder_stay(folder: Path):
    """The mixin's own method deletes a config.json, and makes one of the arguments of __init__."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model": 1, "architecture": "resnet18"}')
    HubGrafts(grafted("top")).save_pretrained(folder)
    assert names_in(folder) == ["README.md", "config.json", "grafts.safetensors"]
    loaded = HubGrafts.from_pretrained(folder, model=HOST.build(), example_input=IMAGE)
    assert (folder / "config.json").read_text() == '{"model": 1, "architecture": "resnet18"}'
    loaded.save_pretrained(folder / "again")
    assert names_in(folder / "again") == FILES


@dataclasses.dataclass(eq=False)
class Described(nn.Module):
    """A host the mixin would take for a config and copy."""

    channels: int = 4

    def __post_init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, self.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the host was copied")


def test_a_host_is_no_config(folder: Path):
    model = Described()
    graft(model, "stem", "context-max", example_input=IMAGE)
    handle = HubGrafts(model)
    assert handle._hub_mixin_config is None
    handle.save_pretrained(folder)
    assert names_in(folder) == FILES


# what is refused


def test_models_without_grafts_and_other_things():
    with pytest.raises(GraftError, match="Tiny has no grafts for the Hub; graft first"):
        HubGrafts(HOST.build())
    with pytest.raises(TypeError, match=r"model \('resnet50'\) must be a torch.nn.Module, the host of the grafts"):
        HubGrafts("resnet50")  # type: ignore[arg-type]


def test_unknown_arguments(folder: Path, remote: Path):
    handle = HubGrafts(grafted("top"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'privat'"):
        handle.save_pretrained(folder, privat=True)
    with pytest.raises(TypeError, match=r"config must be None: grafts.safetensors says how"):
        handle.save_pretrained(folder, config={"a": 1})  # type: ignore[arg-type]
    assert not folder.exists()
    with pytest.raises(TypeError, match="unexpected keyword argument 'privat'"):
        handle.push_to_hub("user/name", privat=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'privat'"):
        handle.save_pretrained(folder, push_to_hub=True, privat=True)
    refused(folder, "unexpected keyword argument 'exampel_input'", TypeError, exampel_input=IMAGE)
    assert not remote.exists()


def test_the_model_is_needed(folder: Path):
    HubGrafts(grafted("top")).save_pretrained(folder)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'model'"):
        HubGrafts.from_pretrained(folder)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"model \(None\) must be a torch.nn.Module, the host of the grafts"):
        HubGrafts.from_pretrained(folder, model=None)  # type: ignore[arg-type]


def test_folders_and_repositories_without_grafts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    folder.mkdir()
    refused(folder, "folder '.*attn' has no file 'grafts.safetensors'; HubGrafts.save_pretrained writes it")
    refused(folder / "none", "there is no folder '.*none', nor can it be had from the Hub: Repo id must")
    refused(
        "user/name",
        "there is no folder 'user/name', the Hub's 'grafts.safetensors' of that name is not in the cache",
        cache_dir=folder,
        local_files_only=True,
    )

    def missing(*_: Any, **__: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(hub, "hf_hub_download", missing)
    refused("user/name", "repository 'user/name' has no file 'grafts.safetensors'; HubGrafts.push_to_hub writes it")


def test_what_load_grafts_refuses(folder: Path):
    model = grafted("top")
    HubGrafts(model).save_pretrained(folder)
    refused(folder, "already has a graft named 'sagan'", model=model)
    (folder / "grafts.safetensors").write_bytes(b"no grafts")
    refused(folder, "is no safetensors file")


def test_what_save_grafts_refuses(folder: Path):
    model = grafted("top")
    handle = HubGrafts(model)
    folder.write_text("a file")
    with pytest.raises(GraftError, match=r"the grafts cannot be written to '.*attn'"):
        handle.save_pretrained(folder)
    handle.grafts.remove()
    assert not is_grafted(model)
    with pytest.raises(GraftError, match="no grafts to save"):
        handle.save_pretrained(folder.with_name("other"))


# the mixin, and when it is imported


def test_the_signatures_hold_what_the_mixin_calls():
    own = inspect.signature(HubGrafts.save_pretrained).parameters
    assert own.keys() >= {"save_directory", "config", "repo_id", "push_to_hub", "model_card_kwargs"}
    assert HubGrafts.push_to_hub is ModelHubMixin.push_to_hub


def ran(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_it_says_what_to_install():
    code = """
import sys
sys.modules["huggingface_hub"] = None
import sagan_attn
try:
    from sagan_attn import HubGrafts
except ImportError as error:
    print(error)
"""
    assert "pip install huggingface_hub" in ran(code)
    with pytest.raises(AttributeError, match="module 'sagan_attn' has no attribute 'HubGraft'"):
        _ = sagan_attn.HubGraft  # type: ignore[attr-defined]
