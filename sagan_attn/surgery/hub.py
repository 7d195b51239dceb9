"""HubGrafts: the grafts of a model on the Hugging Face Hub, or in a folder like those there, without the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.files import write_whole
from sagan_attn.surgery.build import BlockLike
from sagan_attn.surgery.graft import grafts_of, is_grafted
from sagan_attn.surgery.grafts import Grafts
from sagan_attn.surgery.store import load_grafts, save_grafts

try:
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )
except ImportError as error:
    raise ImportError(
        f"HubGrafts needs huggingface_hub 0.30 or later ({error}): pip install huggingface_hub"
    ) from error

__all__ = ["FILE", "HubGrafts"]

FILE = "grafts.safetensors"

CARD = """---
{{ card_data }}
---

# Grafts for {{ host }}

Blocks for the feature maps of a model that is not in this repository. `grafts.safetensors`, a file of `sagan_attn`,
holds their tensors and how to rebuild them; no code.

| place | name | block | parameters |
|---|---|---|---|
{% for graft in grafts -%}
| `{{ graft.site }}` | `{{ graft.name }}` | `{{ graft.block }}` | {{ graft.parameters }} |
{% endfor %}
To put them into the model they were made for, with the weights it had:

```python
from sagan_attn import HubGrafts

grafted = HubGrafts.from_pretrained("<user>/<name>", model=model{{ blocks }})
grafted.model  # the same model, with the blocks in it
```
"""


class HubGrafts(ModelHubMixin, library_name="sagan_attn", tags=["sagan_attn"], model_card_template=CARD):
    """A grafted model whose grafts go to and come from the Hugging Face Hub. The model itself is never uploaded.

    `save_pretrained(folder)` and `push_to_hub("user/name")` write `grafts.safetensors` and a model card,
    `from_pretrained` grafts them into a host.

    Args:
        model: a model with grafts; it is kept, not copied.

    Raises:
        TypeError: `model` is no module.
        GraftError: `model` has no grafts.
    """

    model: nn.Module

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)  # that of the mixin makes a config of the arguments, here of the host

    def __init__(self, model: nn.Module) -> None:
        _check_module(model)
        if not is_grafted(model):
            raise GraftError(f"{type(model).__name__} has no grafts for the Hub; graft first")
        self.model = model

    @property
    def grafts(self) -> Grafts:
        """All grafts the model has now: what would be saved."""
        return grafts_of(self.model)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `grafts.safetensors`, as `save_grafts` does, and a README.md unless there is one.

        Args:
            save_directory: made if it is not there. Its other files are left alone.
            config: the mixin's; None alone is taken, since the file says how to rebuild the grafts.
            repo_id: of the repository to push to; the folder's name by default.
            push_to_hub: whether to call `push_to_hub` afterwards.
            model_card_kwargs: values for the template of the README.md.
            push_to_hub_kwargs: of `push_to_hub`.

        Returns:
            The URL of the commit if it was pushed.

        Raises:
            TypeError: an unknown keyword argument, a config. Nothing was written.
            GraftError: what `save_grafts` refuses; a folder that cannot be made; a README.md that cannot be written.
        """
        if push_to_hub_kwargs and not push_to_hub:  # the mixin passes over them in silence
            name = next(iter(push_to_hub_kwargs))
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r} (without push_to_hub=True)")
        if config is not None:
            raise TypeError(f"config must be None: {FILE} says how to rebuild the grafts")
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GraftError(f"the grafts cannot be written to {str(folder)!r}: {error}") from error
        # Not the mixin's own method, which deletes a config.json: that of another model, if there is one.
        save_grafts(self.model, folder / FILE)
        card = folder / "README.md"
        if not card.exists():
            text = str(self.generate_model_card(**(model_card_kwargs or {})))
            try:
                write_whole(card, text.encode())
            except OSError as error:
                raise GraftError(f"the grafts are written, their {card.name} is not: {error}") from error
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or folder.resolve().name,
            model_card_kwargs=dict(model_card_kwargs or {}),
            **push_to_hub_kwargs,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        model: nn.Module,
        example_input: Any = None,
        blocks: Mapping[str, BlockLike] | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Graft what `save_pretrained` or `push_to_hub` wrote into a host, in place. Runs no code of the repository.

        Args:
            pretrained_model_name_or_path: a folder, or a repository "user/name" of the Hub.
            model: the host, as in `load_grafts`.
            example_input: as in `graft`.
            blocks: as in `load_grafts`.
            force_download: download the file even if it is in the cache.
            token: of the Hub; None and True for that of the login, False for none.
            cache_dir: where downloads are kept; the Hub's own place by default.
            local_files_only: look into the cache alone.
            revision: branch, tag or commit; the newest commit by default.

        Raises:
            TypeError: an unknown keyword argument; `model` is missing or no module.
            GraftError: a folder or repository that is not there, cannot be reached or has no `grafts.safetensors`;
                what `load_grafts` refuses. The host was not changed.
        """
        # Not the mixin's own method, which takes arguments from a config.json that these repositories do not have, asks
        # the Hub for it each time, and fails without it under local_files_only.
        _check_module(model)
        path = _find(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        load_grafts(model, path, example_input=example_input, blocks=blocks)
        return cls(model)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md: what the grafts are and how to load them. Keyword arguments go to its template."""
        specs = [graft.point.specs.get(graft.name) for graft in self.grafts]
        rows = [
            {
                "site": graft.site,
                "name": graft.name,
                "block": (spec.block or spec.made_by) if spec else type(graft.block).__name__,
                "parameters": f"{sum(p.numel() for p in graft.block.parameters()):,}",
            }
            for graft, spec in zip(self.grafts, specs, strict=True)
        ]
        own = dict.fromkeys(
            graft.name for graft, spec in zip(self.grafts, specs, strict=True) if spec and not spec.block
        )
        blocks = f", blocks={{{', '.join(f'{name!r}: ...' for name in own)}}}" if own else ""
        host = type(self.model).__name__
        return super().generate_model_card(*args, **{"host": host, "grafts": rows, "blocks": blocks, **kwargs})


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model ({model!r:.100}) must be a torch.nn.Module, the host of the grafts")


def _find(name: str | Path, **options: Any) -> Path:
    """The file of a folder, or of a repository, which is downloaded unless it is in the cache."""
    if Path(name).is_dir():
        if not (Path(name) / FILE).is_file():
            raise GraftError(f"folder {str(name)!r} has no file {FILE!r}; HubGrafts.save_pretrained writes it")
        return Path(name) / FILE
    try:
        return Path(hf_hub_download(str(name), FILE, **options))
    except LocalEntryNotFoundError as error:  # offline, or local_files_only
        reason = f"the Hub's {FILE!r} of that name is not in the cache, and was not downloaded: {error}"
    except EntryNotFoundError as error:
        raise GraftError(f"repository {str(name)!r} has no file {FILE!r}; HubGrafts.push_to_hub writes it") from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"nor can it be had from the Hub: {error}"
    raise GraftError(f"there is no folder {str(name)!r}, {reason}")
