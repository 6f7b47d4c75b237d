"""Read the authors' checkpoints: nothing pickled is run, keys get today's names, nothing is lost in silence."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from .._core.validation import flag, is_dense
from .containers import CheckpointError, form, listed, read, refused, short, told

_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and DDP, and of torch.compile
# computed in a constructor, and not in the released files
_COMPUTED = {"ph_buf", "pw_buf", "arange_h_buf", "arange_w_buf", "pos_emb_buf"}
_CONSTANTS = {"ph", "pw", "arange_h", "arange_w", "fix_offsets", "const_dh_ones", "const_dw_ones"}
_CONSTANTS |= {"const_dh_ones_buf", "const_dw_ones_buf"}

_TORCH_SAVES = 2  # the pickle protocol of torch.save, and the only one that its weights_only reader takes


def _plainly(items: Mapping[str, Any]) -> tuple[Any, ...]:
    """How to pickle a mapping as an OrderedDict, which weights_only reads, and a process without this library too."""
    return OrderedDict, (), None, None, iter(items.items())


class Dropped(NamedTuple):
    """An entry of the file that is left out of the checkpoint; torch.save writes it as a dict of the two."""

    why: str
    tensor: Tensor

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return _plainly(self._asdict()) if protocol == _TORCH_SAVES else tuple.__reduce_ex__(self, protocol)


@dataclass(frozen=True)
class LoadReport:
    """What `Checkpoint.load_into` did with every name of the model and of the checkpoint; prints as a list.

    Attributes:
        loaded: names whose values are now the checkpoint's, or would be had the rest fitted.
        missing: names of the model that the checkpoint lacks.
        unexpected: names of the checkpoint that the model lacks.
        mis_shaped: by name, "dtype shape" in the file and in the model, where they differ in shape or in kind
            (floating, complex, integer, bool).
        conflicting: names that share one tensor in the model and have different values in the file.
        kept: buffers that the model's constructor computes, which released files do not hold.
    """

    model: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mis_shaped: Mapping[str, tuple[str, str]]
    conflicting: tuple[tuple[str, ...], ...]
    kept: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether everything fitted."""
        return not (self.missing or self.unexpected or self.mis_shaped or self.conflicting)

    def __str__(self) -> str:
        wrong = [f"{name}: {file} in the file, {model} in the model" for name, (file, model) in self.mis_shaped.items()]
        shared = [" and ".join(names) for names in self.conflicting]
        parts = {
            "missing from the file": self.missing,
            "unexpected in the file": self.unexpected,
            "mis-shaped": wrong,
            "one tensor in the model, different values in the file": shared,
            "kept as the model has them": self.kept,
        }
        lines = [f"{self.model}: {len(self.loaded)} tensors fit"]
        for title, names in parts.items():
            lines += [f"{title} ({len(names)}):", *(f"  {name}" for name in names)] if names else []
        return "\n".join(lines)


class Checkpoint(dict[str, Tensor]):
    """A state_dict (name -> tensor on the CPU) as `load_checkpoint` read it, under today's names.

    torch.save writes the state_dict alone, a plain OrderedDict without the attributes, so that torch.load reads it
    with weights_only=True and without this library; so does pickle in torch.save's protocol, 2. Other pickles, copy
    and deepcopy give a Checkpoint with all of its attributes.

    Attributes:
        path: the file.
        published: whose network its keys look like: "DyReG", "RSA", "BAT", "TSM", "ResNet" or None.
        extra: everything else in the file, untouched (epoch, arch, best_prec1, optimizer, ...; the metadata of a
            safetensors file). What is no tensor inside a nested state_dict is in `extra["state_dict"]`.
        renamed: by name, the name in the file, for every name that differs.
        dropped: by name in the file, why it was left out, and the tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        path: str,
        extra: dict[Any, Any],
        renamed: dict[str, str],
        dropped: dict[str, Dropped],
    ):
        super().__init__(tensors)
        self.path = path
        self.published = _published(tensors)
        self.extra = extra
        self.renamed = renamed
        self.dropped = dropped

    def __repr__(self) -> str:
        return (
            f"Checkpoint({self.path!r}: {len(self)} tensors, published {self.published!r}, extra {list(self.extra)}, "
            f"{len(self.renamed)} renamed, {len(self.dropped)} dropped)"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return _plainly(self) if protocol == _TORCH_SAVES else super().__reduce_ex__(protocol)

    def load_into(self, model: nn.Module, *, strict: bool = True) -> LoadReport:
        """Copy the tensors into `model`, or into the module that DataParallel, DDP or torch.compile wraps.

        The model keeps its dtypes and devices. A tensor that it has under two names needs one of them in the file.

        Args:
            strict: every name must fit, or nothing is loaded. False loads what fits, and the report tells the rest.

        Raises:
            CheckpointError: with strict, lists every missing, unexpected, mis-shaped and conflicting name; always,
                parameters that cannot be written (on meta, or lazy). TypeError: model is no nn.Module.
            After any exception the model is as it was.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"load_into: model is {short(model)}; accepted is an nn.Module")
        flag("load_into", "strict", strict)
        model = _unwrap(model)
        target = model.state_dict(keep_vars=True)
        hollow = [name for name, t in target.items() if nn.parameter.is_lazy(t) or getattr(t, "is_meta", False)]
        if hollow:
            raise CheckpointError(
                f"load_into: model has no memory for {', '.join(hollow)}; accepted is a model that is not lazy and "
                "not on meta (model.to_empty(device=...) makes room)"
            )
        report = _compare(self, target, model)
        if strict and not report.complete:
            raise CheckpointError(f"load_into: {self.path} does not fit; nothing was loaded\n{report}")
        before = {name: target[name].detach().clone() for name in report.loaded}
        try:
            model.load_state_dict({name: self[name] for name in report.loaded if name in self}, strict=False)
        except BaseException:
            for name, values in before.items():
                with torch.no_grad(), suppress(RuntimeError):  # what cannot be written was not written
                    target[name].copy_(values)
            raise
        return report


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of the published networks, or any state_dict: `load_checkpoint(path).load_into(model)`.

    It is a state_dict, so `model.load_state_dict` takes it too; but the released DyReG file lacks the buffers that
    constructors compute.

    Reads what torch.save wrote (zip, and the older pickles) and safetensors, told apart by content. The state_dict is
    the file itself or its entry "state_dict". `module.` and `_orig_mod.` are stripped where every key has them, keys of
    the released DyReG file get today's names, and its constants are left out.

    torch.load's weights_only unpickler does the reading, with numpy's scalars read by stand-ins of this module: nothing
    in the file is executed. Checksums of a zip are verified.

    Args:
        path: a str or os.PathLike; tensors come to the CPU, wherever they were saved.

    Raises:
        CheckpointError: the file is something else, cut off, damaged, or names classes or functions that a checkpoint
            does not need; the message says what it holds. FileNotFoundError: there is no such file. TypeError: path is
            of another type. ImportError: a safetensors file without the package.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"load_checkpoint: path is {short(path)}; accepted is a str or an os.PathLike")
    if not os.fspath(path):
        raise ValueError(f"load_checkpoint: path is {path!r}; accepted is the name of a file")
    file = Path(path)
    if file.is_dir():
        raise refused(file, "a directory")
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "load_checkpoint: there is no such file", str(file))
    if not file.is_file():  # opening a pipe would wait
        raise refused(file, "no regular file")
    with file.open("rb") as f:
        found, extra = _state(file, *read(file, f))
    tensors, renamed, dropped = _todays_names(file, found)
    return Checkpoint(tensors, path=str(file), extra=extra, renamed=renamed, dropped=dropped)


# --- from the file's names to today's -------------------------------------------------------------------------------


def _state(file: Path, found: object, metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The tensors of the state_dict in a loaded object, and everything else in it."""
    extra: dict[Any, Any] = dict(metadata)
    where = "the dict"
    if isinstance(found, dict) and "state_dict" in found:
        extra |= {key: value for key, value in found.items() if key != "state_dict"}
        found, where = found["state_dict"], "its 'state_dict'"
    if not isinstance(found, dict):
        raise refused(file, f"{told(found)}{' as its state_dict' if where != 'the dict' else ''}")
    tensors = {key: value.detach() for key, value in found.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in found.items() if key not in tensors}
    nested = [key for key, value in rest.items() if isinstance(value, dict) and any(map(_is_tensor, value.values()))]
    if not tensors or nested:
        also = f" ({listed(nested)} would do, saved by itself)" if nested else ""
        raise refused(file, f"{told(found)}, no state_dict{also}")
    unnamed = [key for key in tensors if not isinstance(key, str)]
    if unnamed:
        raise refused(file, f"tensors whose keys in {where} are no names: {listed(unnamed)}")
    odd = {key: t for key, t in tensors.items() if not _is_plain(found[key])}
    if odd:
        raise refused(file, f"other than dense tensors with values: {told(odd)}")
    if rest:
        extra |= {"state_dict": rest} if where != "the dict" else rest
    return tensors, extra


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and is_dense(t) and not t.is_quantized and t.device.type == "cpu"


def _todays_names(
    file: Path, found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Dropped]]:
    """Tensors by today's names, the file's names by today's, and what is dropped."""
    shift = 0
    while prefix := _common_prefix(name[shift:] for name in found):
        shift += len(prefix)
    old = _old_wrappers(name[shift:].split(".") for name in found)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    dropped: dict[str, Dropped] = {}
    for name, t in found.items():
        *path, last = name[shift:].split(".")
        if last in _CONSTANTS and "dynamic_graph" in path:
            dropped[name] = Dropped("a constant of the first version of DyReG, computed now", t)
            continue
        new = _todays_name([*path, last], old)
        if new in tensors:
            raise refused(file, f"two entries for {new!r}: {sources[new]!r} and {name!r}")
        tensors[new], sources[new] = t, name
    return tensors, {new: name for new, name in sources.items() if new != name}, dropped


def _common_prefix(names: Iterable[str]) -> str:
    """A wrapper's prefix that every name has, or ""."""
    every = list(names)
    return next((p for p in _PREFIXES if every and all(name.startswith(p) for name in every)), "")


def _old_wrappers(names: Iterable[list[str]]) -> set[tuple[str, ...]]:
    """Where the released DyReG file has in one module what is a Sequential of two today."""
    parents: dict[str, set[tuple[str, ...]]] = {"block": set(), "dynamic_graph": set()}
    for parts in names:
        for i, part in enumerate(parts[:-1]):
            if part in parents:
                parents[part].add(tuple(parts[:i]))
    return {path for path in parents["dynamic_graph"] if path in parents["block"] or path[-1:] == ("conv2",)}


def _todays_name(parts: list[str], old: set[tuple[str, ...]]) -> str:
    new: list[str] = []
    for i, part in enumerate(parts):
        if tuple(parts[:i]) in old and i + 1 < len(parts):
            if part == "block":
                new.append("0")
            elif part == "dynamic_graph" or parts[i : i + 2] == ["norm_dict", "residual_norm"]:
                new.append("1")
        if parts[i : i + 2] != ["base_model", "map_final_project"]:
            new.append(part)
    return ".".join(new)


def _published(names: Iterable[str]) -> str | None:
    """Whose network has such names."""
    every = set(names)
    parts = {part for name in every for part in name.split(".")}
    kernels = {name.removesuffix("H2.weight") for name in every if name.endswith("H2.weight")}
    told = {
        "DyReG": bool(parts & {"dynamic_graph", "offset_alpha"}),
        "RSA": any(f"{prefix}projection.weight" in every for prefix in kernels),
        "BAT": "batransform" in parts or {"conv_p", "conv_q"} <= parts,
        "TSM": any(name.endswith(".net.weight") for name in every),
        "ResNet": any(name.endswith("layer1.0.conv1.weight") for name in every),
    }
    return next((whose for whose, fits in told.items() if fits), None)


# --- into a model ---------------------------------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside of wrappers; the same rule as for a file's keys, so the two meet."""
    while prefix := _common_prefix(model.state_dict(keep_vars=True)):
        inner = getattr(model, prefix[:-1], None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _number(t: Tensor) -> str:
    """The kind of number, which a copy must not change."""
    if t.dtype == torch.bool:
        return "bool"
    return "floating" if t.is_floating_point() else "complex" if t.is_complex() else "integer"


def _compare(checkpoint: Checkpoint, target: Mapping[str, Any], model: nn.Module) -> LoadReport:
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    fits: list[str] = []
    wrong: dict[str, tuple[str, str]] = {}
    for name, t in checkpoint.items():
        own = target.get(name)
        if isinstance(own, Tensor):
            if own.shape == t.shape and _number(own) == _number(t):
                fits.append(name)
            else:
                wrong[name] = form(t), form(own)
    sharers: dict[int, list[str]] = {}
    for name in fits:
        sharers.setdefault(id(target[name]), []).append(name)
    absent = [name for name in target if name not in checkpoint]
    loaded = [*fits, *(name for name in absent if id(target[name]) in sharers)]
    kept = [name for name in absent if name.rpartition(".")[2] in _COMPUTED and name in buffers and name not in loaded]
    return LoadReport(
        type(model).__name__,
        tuple(loaded),
        tuple(name for name in absent if name not in loaded and name not in kept),
        tuple(name for name in checkpoint if not isinstance(target.get(name), Tensor)),
        wrong,
        tuple(tuple(names) for names in sharers.values() if not _agree([checkpoint[name] for name in names])),
        tuple(kept),
    )


def _agree(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return all(t.data_ptr() == first.data_ptr() or torch.equal(t, first) for t in tensors[1:])
