"""Layers that save themselves, model.safetensors and config.json, and are made again from these, exactly."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._core.validation import FLOATS, as_device, flag, is_dense, is_integer, what
from .files import (
    CONFIG,
    FORMAT,
    SCHEMA,
    WEIGHTS,
    content,
    digest,
    folder_of,
    parsed,
    replace,
    safetensors_torch,
    unpacked,
)
from .hub import download, hub

_POSITIONAL = "*"  # among the arguments: those that a constructor takes by position alone
_ABSENT = object()

_Layer = TypeVar("_Layer", bound="Pretrained")


class _Opaque(NamedTuple):
    """Stands for an argument that JSON cannot hold: the layer works, and is refused when it is saved."""

    kind: str


def _plain(value: object) -> Any:
    """`value` in what JSON gives back: numbers, strings, booleans, None, lists, mappings from strings; or TypeError."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_integer(value) and not isinstance(value, torch.SymInt):
        return int(value)  # type: ignore[call-overload]
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(repr(value) if isinstance(value, float) else type(value).__name__)


def _plain_or_opaque(value: object) -> Any:
    try:
        return _plain(value)
    except TypeError as error:
        return _Opaque(str(error))


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """`init`, which then notes its arguments. Constructors return from the inside out: the outermost note stays.

    The note is plain data in the instance's `__dict__`, so copies and pickles carry it. Not in `__new__`, nor in a
    metaclass: either would hide the constructor's signature.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Pretrained, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        given: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            kind = signature.parameters[name].kind
            if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
                given = {**bound.kwargs, _POSITIONAL: bound.args[1:]}
                break
            given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        noted = {name: _plain_or_opaque(value) for name, value in self._understood(given).items()}
        self.__dict__["_pretrained_arguments"] = noted

    return __init__


class Pretrained(nn.Module):
    """A module with `save_pretrained`, `from_pretrained` and `push_to_hub`; subclasses need nothing more."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    def _understood(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as they are noted; for a class that takes an object to say what it read from it."""
        return arguments

    # --- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Write model.safetensors and config.json into `directory`, which is made if it is missing.

        What is kept: the class, the constructor's arguments, and all tensors of the state_dict, in their dtypes;
        parameters that are one object stay one. Not kept: hooks, `requires_grad`, train or eval mode, the device.

        Each file is written under another name and then renamed, so it is there whole or not at all. The config holds
        a hash of the tensors, and model.safetensors a copy of its config: after a crash between the two, or with two
        writers, `from_pretrained` takes the config that belongs to the tensors it finds.

        Args:
            directory: where to; an earlier save there is replaced, other files are left alone.
            push_to_hub: then also upload to the Hugging Face Hub, as `push_to_hub` does.
            repo_id: the repository to upload to; by default the directory's name, in your account.
            options: of the upload, see `push_to_hub`.

        Returns:
            The URL of the commit, if there was an upload.

        Raises ValueError or TypeError, before anything is written, for what would not come back the same: an argument
        that JSON cannot hold, a parametrization, a submodule, parameter, buffer or public attribute other than the
        constructor makes, a tensor that is on "meta", not dense, or of a subclass. ImportError without safetensors.
        """
        op = f"{type(self).__name__}.save_pretrained"
        folder = folder_of(op, directory)
        if not flag(op, "push_to_hub", push_to_hub) and (repo_id is not None or options):
            given = sorted([*options, *(["repo_id"] if repo_id is not None else [])])
            raise TypeError(f"{op}: push_to_hub is False with {given}; accepted is True with them")
        if push_to_hub:
            hub(op)
            from huggingface_hub.utils import validate_repo_id

            repo_id = folder.resolve().name if repo_id is None else repo_id
            validate_repo_id(repo_id)
        self._write(op, folder)
        return self.push_to_hub(repo_id, **options) if push_to_hub else None  # type: ignore[arg-type]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the layer to the Hugging Face Hub, through `huggingface_hub.ModelHubMixin.push_to_hub`.

        Args:
            repo_id: "name" or "user/name"; made if it is missing.
            options: of that method: commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns,
                delete_patterns, model_card_kwargs.

        Returns:
            The URL of the commit.

        Raises what `save_pretrained` does; ImportError without huggingface_hub.
        """
        op = f"{type(self).__name__}.push_to_hub"
        repository = hub(op)(self)
        card = {"layer": _name(type(self)), "repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        return repository.push_to_hub(repo_id, model_card_kwargs=card, **options)

    def _write(self, op: str, folder: Path) -> None:
        safetensors = safetensors_torch(op)
        arguments = self._noted(op)
        tensors = self._tensors(op)
        again = _made(op, type(self), arguments, "its arguments")
        _same_submodules(op, self, again)
        if differences := _differences(again.state_dict(), tensors):
            raise ValueError(f"{op}: {differences}; accepted is what the constructor makes")
        _same_settings(op, self, again)

        from .._core.version import __version__

        first: dict[int, str] = {}  # of the names of one tensor, the one it is stored under
        shared = {name: first.setdefault(id(t), name) for name, t in tensors.items()}
        shared = {name: kept for name, kept in shared.items() if name != kept}
        stored = {
            name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, t in tensors.items()
            if name not in shared
        }
        config = {
            "format": FORMAT,
            "schema": SCHEMA,
            "version": __version__,
            "class": _name(type(self)),
            "arguments": arguments,
            "weights": digest(stored),
            **({"shared": shared} if shared else {}),
        }
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        try:
            data = safetensors.save(stored, metadata={"format": "pt", FORMAT: text})
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{op}: safetensors cannot hold the tensors: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / WEIGHTS, data)
        replace(folder / CONFIG, text.encode())

    def _noted(self, op: str) -> dict[str, Any]:
        """The constructor's arguments."""
        noted = vars(self).get("_pretrained_arguments")
        if noted is None:
            raise TypeError(
                f"{op}: the layer was made without its constructor; accepted is one whose arguments are known"
            )
        for name, value in noted.items():
            if isinstance(value, _Opaque):
                raise TypeError(
                    f"{op}: argument {name!r} of {type(self).__name__} is or holds {value.kind}; accepted are finite "
                    "numbers, strings, booleans, None, and lists and mappings of these"
                )
        return noted

    def _tensors(self, op: str) -> dict[str, Tensor]:
        """The state_dict, of the parameters and buffers themselves."""
        for path, module in self.named_modules():
            if nn.utils.parametrize.is_parametrized(module):
                raise ValueError(
                    f"{op}: {path or 'the layer'} is parametrized; accepted is what "
                    "torch.nn.utils.parametrize.remove_parametrizations leaves of it"
                )
        tensors = self.state_dict(keep_vars=True)
        for name, t in tensors.items():
            if type(t) not in (Tensor, nn.Parameter) or not is_dense(t):
                kind = what(t) if type(t) in (Tensor, nn.Parameter) else f"a {type(t).__name__}"
                raise TypeError(f"{op}: {name} is {kind}; accepted are dense tensors, and no subclass of them")
            if t.is_meta:
                raise ValueError(f"{op}: {name} is {what(t)}; accepted is a device that holds data")
        return tensors

    # --- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[_Layer],
        directory_or_repo_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> _Layer:
        """The layer that `save_pretrained` wrote, in eval mode, as with Hugging Face's models.

        Nothing in the files is executed, and they choose no class: call this of the class that was saved. The state of
        torch's random generator is left as it was.

        Args:
            directory_or_repo_id: a folder, or "user/name" on the Hugging Face Hub if there is no such folder.
            device: where to; by default the CPU.
            dtype: a floating dtype for all; by default every tensor has the one it was saved with.
            revision: branch, tag or commit on the Hub.
            token, cache_dir, force_download, local_files_only: of the download, as in huggingface_hub.

        Raises FileNotFoundError for a missing folder, repository or file; ValueError for files that are damaged, of
        another format or class, of a newer schema (it says what to install), with arguments that the constructor does
        not take, or with tensors missing, unexpected or of another shape (all are listed); ImportError without
        safetensors, or without huggingface_hub where the Hub is meant.
        """
        op = f"{cls.__name__}.from_pretrained"
        target = as_device(op, "cpu" if device is None else device)
        if target.type == "meta":
            raise ValueError(f"{op}: device is {device!r}; accepted is a device that holds data")
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"{op}: dtype is {dtype!r}; accepted are None and {', '.join(map(str, FLOATS))}")
        folder, repo_id = folder_of(op, directory_or_repo_id, "directory_or_repo_id"), str(directory_or_repo_id)
        if folder.is_dir():
            if revision is not None:
                raise ValueError(
                    f"{op}: revision is {revision!r} with the folder {repo_id!r}; accepted with it is None"
                )
            files = folder / CONFIG, folder / WEIGHTS
        elif (
            not folder.exists()
            and isinstance(directory_or_repo_id, str)
            and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id)
        ):
            files = download(
                op,
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        else:
            raise FileNotFoundError(f"{op}: {repo_id!r} is no folder; accepted is one, or 'user/name' on the Hub")
        layer = cls._read(op, *files)
        try:
            return layer.to(target, dtype).eval()
        except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for a device
            raise ValueError(f"{op}: device is {str(device)!r}; accepted is one that is here: {error}") from error

    @classmethod
    def _read(cls: type[_Layer], op: str, config_file: Path, weights_file: Path) -> _Layer:
        config = parsed(op, str(config_file), content(op, config_file))
        tensors, inner = unpacked(op, weights_file)
        found = digest(tensors)
        if config["weights"] != found and inner is not None:  # config.json is of another save than the tensors
            config = parsed(op, f"the config in {weights_file}", inner)
        if config["weights"] != found:
            raise ValueError(
                f"{op}: {weights_file} is damaged, or of another save than {config_file}: its hash differs"
            )
        if config["class"] != _name(cls):
            raise ValueError(
                f"{op}: {config_file} is of class {config['class']!r}, whose from_pretrained loads it; "
                f"accepted here is {_name(cls)!r}"
            )
        layer = _made(op, cls, config["arguments"], f"the arguments in {config_file} (version {config['version']!r})")
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        shared = {name: kept for name, kept in config["shared"].items() if kept in tensors and name not in tensors}
        tensors.update({name: tensors[kept] for name, kept in shared.items()})
        if differences := _differences(layer.state_dict(), tensors):
            raise ValueError(f"{op}: {weights_file} does not fit {config_file}: {differences}")
        for name in shared.values() & parameters.keys():  # one object, or load_state_dict makes a parameter of each
            tensors[name] = nn.Parameter(tensors[name], parameters[name].requires_grad)
        tensors.update({name: tensors[kept] for name, kept in shared.items()})
        layer.load_state_dict(tensors, assign=True)
        return layer


# --- what a save holds ----------------------------------------------------------------------------------------------


def _name(cls: type) -> str:
    """What a config calls the class. A user's goes by its own name alone, so that it may move to another module."""
    module, name = cls.__module__, cls.__name__
    if not module.startswith("dyreg_triton."):
        return name
    return f"dyreg_triton.layers.{name}" if module.startswith("dyreg_triton.layers.") else f"{module}.{name}"


def _made(op: str, cls: type[_Layer], arguments: Mapping[str, Any], source: str) -> _Layer:
    """A new layer on the CPU, whatever the default device; the random generator stays as it was."""
    named = copy.deepcopy(dict(arguments))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return cls(*named.pop(_POSITIONAL, ()), **named)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: {cls.__name__} cannot be made from {source}: {error}") from error


def _same_submodules(op: str, layer: nn.Module, again: nn.Module) -> None:
    """Refuse a layer whose submodules are not those of its constructor."""
    have = dict(layer.named_modules(remove_duplicate=False))
    made = dict(again.named_modules(remove_duplicate=False))
    for path in [*made, *(have.keys() - made.keys())]:
        mine, its = (type(modules[path]) if path in modules else None for modules in (have, made))
        if mine is not its:
            told = [kind.__name__ if kind else "nothing" for kind in (mine, its)]
            if mine and told[0] == told[1]:  # as PEFT's adapters are called
                told[0] = f"{mine.__module__}.{told[0]}"
            raise ValueError(
                f"{op}: submodule {path!r} is {told[0]}; accepted is what the constructor makes, {told[1]}"
            )


def _same_settings(op: str, layer: nn.Module, again: nn.Module) -> None:
    """Refuse a layer, of the same submodules, that holds something else beside its state_dict."""
    have = dict(layer.named_modules(remove_duplicate=False))
    for path, module in again.named_modules(remove_duplicate=False):
        given, wanted = _beside(have[path], module), _beside(module, module)
        for name, value in wanted.items():
            if given.get(name, _ABSENT) != value:
                place = f"{path}.{name}".lstrip(".")
                now = f"{given[name]!r:.200}" if name in given else "missing, or of another kind"
                raise ValueError(f"{op}: {place} is {now}; accepted is what the constructor makes, {value!r:.200}")


def _beside(module: nn.Module, like: nn.Module) -> dict[str, Any]:
    """What a module computes with beside its state_dict, of the names in `like`: public attributes that are plain data,
    which names are parameters, buffers that are not persistent."""
    held: dict[str, Any] = {}
    for name in vars(like):
        value = _plain_or_opaque(vars(module).get(name, _ABSENT))
        if not name.startswith("_") and name != "training" and not isinstance(value, _Opaque):
            held[name] = value
    held.update(dict.fromkeys((name for name, p in module._parameters.items() if p is not None), "a parameter"))
    for name in like._non_persistent_buffers_set:
        buffer = module._buffers.get(name)
        held[name] = what(buffer) if buffer is None or buffer.is_meta else f"a buffer, {digest({name: buffer.cpu()})}"
    return held


def _differences(expected: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """How the tensors do not fit those that are expected, all of them; "" if they do."""
    told = {
        "missing are": sorted(expected.keys() - tensors.keys()),
        "unexpected are": sorted(tensors.keys() - expected.keys()),
        "misfits are": [
            f"{name} {what(tensors[name])} for {what(t)}"
            for name, t in sorted(expected.items())
            if name in tensors
            and (t.shape != tensors[name].shape or t.is_floating_point() != tensors[name].is_floating_point())
        ],
    }
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in told.items() if names)
