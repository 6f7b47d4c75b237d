"""Layers on the Hugging Face Hub, through its own mixin; the package is imported at first use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import CONFIG, WEIGHTS

_CARD = """---
{{ card_data }}
---

A layer of dyreg-triton. To load it: `{{ layer }}.from_pretrained("{{ repo_id }}")`
"""


def hub(op: str) -> Any:
    """huggingface_hub's mixin, around a layer to push or the files that it fetched.

    It is no base class of the layers: they work without the package, and its own `save_pretrained` removes an earlier
    config before it writes.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{op}: the package huggingface_hub is missing; pip install 'dyreg-triton[hub]'") from error

    class Repository(  # type: ignore[call-arg, unused-ignore]  # where the package is missing
        huggingface_hub.ModelHubMixin, library_name="dyreg-triton", model_card_template=_CARD
    ):
        def __init__(self, content: Any):
            self.content = content

        def _save_pretrained(self, save_directory: Path) -> None:
            self.content._write(op, save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Repository:
            download = {key: options[key] for key in _DOWNLOAD}  # the mixin adds what it takes from the config
            return cls(
                [Path(huggingface_hub.hf_hub_download(model_id, name, **download)) for name in (CONFIG, WEIGHTS)]
            )

    return Repository


_DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")


def download(op: str, repo_id: str, **options: Any) -> tuple[Path, Path]:
    """The config and the weights of a repository, fetched."""
    try:
        repository = hub(op)
    except ImportError as error:
        raise ImportError(f"{op}: there is no folder {repo_id!r}; to look on the Hub, {error}") from error
    from huggingface_hub import errors

    try:
        return tuple(repository.from_pretrained(repo_id, **options).content)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(f"{op}: {repo_id!r} is no folder, and not to be had from the Hub: {error}") from error
    # the mixin reads the config too, and takes it to be an object
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        raise ValueError(f"{op}: {CONFIG} of {repo_id!r} on the Hub is not of this library: {error}") from error
