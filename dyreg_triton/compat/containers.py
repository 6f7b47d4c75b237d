"""What is in a file: an object in one of torch.save's formats or safetensors, read without running it, or what else."""

from __future__ import annotations

import io
import pickletools
import re
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .._core.validation import is_dense


class CheckpointError(ValueError):
    """A file that is no checkpoint, or a checkpoint that does not fit a model."""


def refused(file: Path, holds: str) -> CheckpointError:
    return CheckpointError(
        f"load_checkpoint: {str(file)!r} holds {holds}; accepted is a state_dict, or a dict with one as 'state_dict', "
        "written by torch.save or safetensors"
    )


def short(value: object) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def listed(names: Iterable[object], most: int = 12) -> str:
    """The names, in quotes; not all of a thousand."""
    texts = [f"{name!r:.80}" for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def told(value: object) -> str:
    """What an object is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor ({form(value)}{', meta' if value.is_meta else ''}, {value.layout})"
    if isinstance(value, dict):
        parts = [f"{key!r:.60} ({kind(item)})" for key, item in list(value.items())[:12]]
        more = f" and {len(value) - 12} more" if len(value) > 12 else ""
        return f"a dict of {', '.join(parts) or 'nothing'}{more}"
    if isinstance(value, (list, tuple)):
        kinds = Counter(map(kind, value))
        return f"a {kind(value)} ({', '.join(f'{count} x {kind}' for kind, count in kinds.items()) or 'empty'})"
    return f"one {kind(value)}"


def kind(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (dict, list, tuple)) else type(value).__name__


def form(t: Tensor) -> str:
    return f"{str(t.dtype)[6:]} {tuple(t.shape)}"


# --- what the file holds --------------------------------------------------------------------------------------------

_MAGIC = {
    b"\x1f\x8b": "data compressed by gzip; unpack it first",
    b"BZh": "data compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "data compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "data compressed by zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"\x93NUMPY": "a numpy array (.npy)",
    b"\x89HDF": "HDF5 data (Keras, MATLAB)",
    b"GGUF": "a GGUF model",
    b"version https://git-lfs": "a git-lfs pointer and not the file itself; `git lfs pull` gets it",
}
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")
_TENSORFLOW_TABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # ends the index of a TensorFlow checkpoint
_PICKLED_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save's magic number, as pickles write it


def read(file: Path, f: BinaryIO) -> tuple[object, dict[str, str]]:
    """The object that the file holds, and its metadata."""
    head = f.read(1024)
    size = f.seek(0, io.SEEK_END)
    f.seek(max(0, size - 8))
    tail = f.read()
    if head.startswith(b"PK\x03\x04"):
        return _load(file, f, _zip_storages(file, f, size)), {}
    if head[:1] == b"\x80" and _PICKLED_MAGIC in head[:32]:
        return _load(file, f, None), {}
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return _read_safetensors(file)
    raise refused(file, _foreign(f, head, tail))


def _foreign(f: BinaryIO, head: bytes, tail: bytes) -> str:
    """What a file that is no checkpoint seems to be."""
    if not head:
        return "nothing: it is empty"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    if head.lstrip().lower().startswith(_HTML):
        title = re.search(rb"<title[^>]*>([^<]{1,80})", head, re.IGNORECASE)
        named = f", titled {title[1].decode('utf-8', 'replace').strip()!r}" if title else ""
        return f"an HTML page{named}: the download failed"
    if head.startswith(b"PK"):
        return "a zip archive that is empty, cut off or in parts"
    if head[257:262] == b"ustar":
        return f"a tar archive{_members(f)}; unpack it first"
    if head[4:8] == b"TFL3" or tail == _TENSORFLOW_TABLE or head.startswith(b"\x08\x01\x12"):
        return "a model or checkpoint of TensorFlow"
    if re.match(rb"\x08[\x02-\x1f][\x12\x3a\x42]", head):  # field 1, a small version; then producer, graph or opset
        return "an ONNX model"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        names = _pickled_globals(f)
        return f"a plain pickle, not of torch.save (it was not run{f'; it names {listed(names)}' if names else ''})"
    start = head[:40]
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return f"text that begins with {start.decode()!r}"
    return f"unknown data that begins with {start[:16].hex(' ')}"


def _members(f: BinaryIO) -> str:
    """The first names in a tar archive."""
    f.seek(0)
    try:
        with tarfile.open(fileobj=f, mode="r:") as archive:
            names = [member.name for member, _ in zip(archive, range(4), strict=False)]
    except Exception:  # a damaged one; that it is a tar is all there is to say
        return ""
    return f" of {listed(names)}"


# --- torch.save -----------------------------------------------------------------------------------------------------


def _zip_storages(file: Path, f: BinaryIO, size: int) -> Counter[int]:
    """How many records of which size a zip of torch.save has; refuses any other zip."""
    damaged = "a zip archive that is cut off or damaged"
    try:
        archive = zipfile.ZipFile(f)
        records = archive.infolist()
        names = [record.filename for record in records]
        if names and all(name.endswith(".npy") for name in names):
            raise refused(file, f"numpy arrays (.npz): {listed(names)}")
        if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in names):
            raise refused(file, "a TorchScript archive, which holds code; torch.jit.load(path).state_dict() has its")
        if sum(bool(re.fullmatch(r"[^/]+/data\.pkl", name)) for name in names) != 1:
            raise refused(file, f"a zip archive that torch.save did not write: {listed(names)}")
        if len(set(names)) < len(names):
            raise refused(file, "a zip archive with two records of one name")
        # torch.save stores as is: what is smaller in the file than in memory is a bomb, or was packed again
        packed = [r.filename for r in records if r.compress_type or r.compress_size != r.file_size]
        if packed:
            raise refused(file, f"a zip archive with compressed records, which torch.save does not write: {packed[0]}")
        if sum(record.file_size for record in records) > size:
            raise refused(file, "a zip archive whose records are larger than the file")
        # torch itself does not look at checksums; torch.serialization.set_crc32_options(False) makes all of them 0
        broken = archive.testzip() if any(record.CRC for record in records) else None
    except CheckpointError:
        raise
    except Exception as error:  # zipfile has many ways to fail on a damaged archive
        raise refused(file, f"{damaged} ({error or type(error).__name__})") from None
    if broken is not None:
        raise refused(file, f"{damaged} (wrong checksum of {broken})")
    return Counter(record.file_size for record in records)


class _Dtype:
    """Reads a pickled numpy.dtype of plain numbers; numpy's own would take any state that a file gives it."""

    def __init__(self, code: str, align: object = False, copy: object = False):
        if not (isinstance(code, str) and re.fullmatch(r"b1|[iufc]\d\d?", code)):
            raise ValueError(f"numpy.dtype {short(code)} is not of plain numbers")
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


def _scalar(dtype: _Dtype | np.dtype, data: bytes) -> Any:
    """A pickled numpy scalar."""
    plain = np.dtype(dtype.order + dtype.code) if isinstance(dtype, _Dtype) else np.dtype(dtype.str)
    if plain.kind not in "biufc" or len(data) != plain.itemsize:
        raise ValueError(f"a numpy scalar of {plain} with {len(data)} bytes")
    return np.frombuffer(data, plain)[0]


_NUMPY: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]
_NUMPY_DTYPES = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFD"]
_LOCK = threading.Lock()  # what safe_globals allows, it allows to all threads, until the first one leaves
# What torch.load accepts, to name what else a file asks for; what is accepted is up to torch.load
_ACCEPTED = re.compile(
    r"(collections|_codecs|builtins|__builtin__)\.(OrderedDict|Counter|encode|set|bytearray|complex)"
    r"|torch\.(cuda\.)?\w+Storage|torch\.(Tensor|Size|device|bool|[a-z]+\d\w*)|torch\.storage\.\w+"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)


def _numpy_globals() -> list[Any]:
    """What to allow for numpy scalars: names that the application has allowed as numpy's own stay so."""
    allowed = torch.serialization.get_safe_globals()
    names = {g[1] if isinstance(g, tuple) else f"{g.__module__}.{g.__qualname__}" for g in allowed}
    ours = [g for g in _NUMPY if g[1] not in names] + (_NUMPY_DTYPES if "numpy.dtype" in names else [])
    return [g for g in ours if g not in allowed]  # leaving safe_globals takes back all that it was given


def _load(file: Path, f: BinaryIO, storages: Counter[int] | None) -> object:
    """The object in a file of torch.save; `storages` are the sizes of the records of a zip."""
    size = f.seek(0, io.SEEK_END)
    f.seek(0)
    try:
        with _LOCK, torch.serialization.safe_globals(_numpy_globals()):
            found = torch.load(f, map_location="cpu", weights_only=True, mmap=False)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(found)}
    except Exception as error:  # torch.load has a dozen ways to fail on a damaged or hostile file
        names = [name for name in _pickled_globals(f) if not _ACCEPTED.fullmatch(name)]
        if names:
            what = "a whole pickled module" if any(n.startswith("torch.nn.modules.") for n in names) else "a pickle"
            reason = f"{what} that asks for {listed(names, 50)}; none of it was imported or run"
        else:
            # torch goes on to advise to load it unsafely
            why = re.split(r"\n| Please | In PyTorch 2", str(error.__context__ or error))[0]
            reason = f"data of torch.save that is cut off, damaged or unsupported ({type(error).__name__}: {why})"
        raise refused(file, reason) from None
    # a tensor that claims more memory than the file gave it would show us memory of the process
    if sum(sizes.values()) > size if storages is None else Counter(sizes.values()) - storages:
        raise refused(file, "tensors larger than what the file stores for them")
    return found


def _tensors(found: object) -> Iterator[Tensor]:
    """Every tensor with memory of its own in nested dicts, lists and tuples."""
    seen, queue = set(), [found]
    while queue:
        value = queue.pop()
        if isinstance(value, Tensor):
            if is_dense(value) and not value.is_meta and value.untyped_storage().nbytes():
                yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            queue += value.values() if isinstance(value, dict) else value


def _pickled_globals(f: BinaryIO) -> list[str]:
    """The classes and functions that the pickles in a file name, in order, found by reading opcodes."""
    f.seek(0)
    try:
        with zipfile.ZipFile(f) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    except Exception:  # no zip
        f.seek(0)
        data = f.read(2**26)  # an older file: pickles, then the numbers
    stream = io.BytesIO(data)
    names: dict[str, None] = {}
    try:
        for _ in range(5):  # magic number, version, system, object, keys of the storages
            names |= dict.fromkeys(_globals(stream))
    except Exception:  # the end, or no pickle from here on
        pass
    return list(names)


def _globals(stream: BinaryIO) -> Iterator[str]:
    """The globals of one pickle; reads to its end."""
    strings: list[str] = ["?", "?"]
    memo: dict[int, object] = {}
    last: object = None
    for opcode, value, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(value).replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif name.startswith("EXT"):
            yield f"copyreg extension {value}"
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if value is None else int(str(value))] = last
            continue
        last = memo.get(int(str(value))) if "GET" in name else value
        if isinstance(last, str):
            strings.append(last)


# --- safetensors ----------------------------------------------------------------------------------------------------


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f"load_checkpoint: {str(file)!r} is a safetensors file; `pip install safetensors` to read it"
        ) from error
    try:
        with safe_open(file, framework="pt", device="cpu") as f:
            # copies: these tensors are the mapped file, and would change or vanish with it
            return {name: f.get_tensor(name).clone() for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except Exception as error:
        raise refused(file, f"safetensors data that are cut off or damaged ({error})") from None
