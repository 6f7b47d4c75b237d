"""Which config a launch gets: pure lookup, so the same call gets the same config on every rank, and nothing is timed.

A key that a file holds is taken from the first file that does: the explicit one, the user's, the packaged. Failing
that the nearest key of the first file that has a similar one. Failing that the heuristic.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import torch
from torch import Tensor

from .._core.gpu import Gpu, family, gpu_of
from .._core.validation import what
from .files import Entry, Unusable, packaged_file, read, report, user_file
from .keys import Key
from .table import SPACES

generation = 0  # of plans: what was planned before it changed is not used after
_explicit: Path | None = None
_files: dict[Gpu, list[tuple[str, Path, dict[Key, Entry]]]] = {}
_found: dict[tuple[Key, torch.device], Any] = {}
_unfit: dict[tuple[Key, torch.device], int] = {}  # and the generation in which they were rejected
_overrides: list[Callable[[Key, Any], Any]] = []  # innermost last


class Origin(NamedTuple):
    """A config and where it comes from.

    Attributes:
        config: the config.
        source: "explicit", "user", "packaged" or "heuristic".
        path: the file.
        key: the key of the file that was taken, exact or nearest.
        entry: what the file says of it.
    """

    config: Any
    source: str
    path: Path | None = None
    key: Key | None = None
    entry: Entry | None = None


def _renew() -> None:
    """Look every config up anew."""
    global generation
    generation += 1
    _found.clear()


def forget() -> None:
    """Read all files anew at the next lookup."""
    _files.clear()
    _unfit.clear()
    _renew()


class Unfit(Exception):
    """A config of a file needs more than the GPU has, and is out of use from now on: launch again."""


class use:  # lower case because it is used as `with dt.tuning.use(path):`
    """Take launch configs from the tuning file `path` first; None: from no explicit file.

    `dt.tuning.use(path)` sets it from here on; `with dt.tuning.use(path):` restores the former one at the end. It holds
    for the whole process, because a backward runs in threads of its own. A file for another GPU, a stale or a corrupt
    one is reported once and ignored.

    Raises:
        TypeError: path is no str, no os.PathLike and not None; or the setting itself is copied or pickled.
        ValueError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"use: path is {what(path)}; accepted is a path or None")
        self.path = None if path is None else Path(path).absolute()
        if self.path is not None and not self.path.is_file():
            raise ValueError(f"use: path is {str(path)!r}; accepted is a tuning file; this is none")
        self._formers = [_explicit]  # what to go back to, innermost last
        self._entered = False
        _set(self.path)

    def __enter__(self) -> use:
        if self._entered or _explicit is not self.path:  # the constructor's setting is over
            self._formers.append(_explicit)
            _set(self.path)
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        _set(self._formers.pop())

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        path = None if self.path is None else str(self.path)
        raise TypeError(
            f"use: a setting of one process cannot be copied or pickled; accepted is dt.tuning.use({path!r}) where it "
            "shall hold"
        )


def _set(path: Path | None) -> None:
    global _explicit
    _explicit = path
    forget()


def _explicit_file() -> Path | None:
    if _explicit is not None:
        return _explicit
    named = os.environ.get("DYREG_TRITON_TUNING")
    return Path(named).absolute() if named else None


def _sources(gpu: Gpu) -> list[tuple[str, Path, dict[Key, Entry]]]:
    """The files for this GPU that there are and that can be used, in order."""
    if gpu not in _files:
        explicit = _explicit_file()
        candidates = [("explicit", explicit)] if explicit is not None else []
        with contextlib.suppress(RuntimeError):  # a user without a home has no file there
            candidates.append(("user", user_file(gpu)))
        candidates.append(("packaged", packaged_file(gpu)))
        found = []
        for source, path in candidates:
            try:
                if source == "explicit" or path.is_file():
                    found.append((source, path, read(path, gpu, packaged=source == "packaged")))
            except (Unusable, OSError) as reason:  # OSError: a folder that may not be read
                report(path, str(reason))
        _files[gpu] = found
    return _files[gpu]


def tuned_by(gpu: Gpu) -> list[str]:
    """The files that lookups for this GPU read, as "source: name"; none where only the heuristic is there."""
    return [f"{source}: {path.name}" for source, path, _ in _sources(gpu)]


def origin(key: Key, device: torch.device | str) -> Origin:
    """The config for `key` on `device`, and where it comes from.

    Raises TypeError for what is no `Key`, and RuntimeError where no kernel runs on the device.
    """
    if not isinstance(key, Key):
        raise TypeError(f"origin: key is {what(key)}; accepted is a dyreg_triton.tuning.Key")
    device = torch.device(device)
    return origin_on(key, gpu_of(device), family(device))


def origin_on(key: Key, gpu: Gpu, family: str) -> Origin:
    """`origin` on a GPU that need not be here."""
    files = _sources(gpu)
    for source, path, entries in files:
        if key in entries:
            return Origin(entries[key].config, source, path, key, entries[key])
    for source, path, entries in files:
        for near in by_distance(key, entries)[:1]:
            return Origin(taken_over(entries[near], key, family), source, path, near, entries[near])
    return Origin(SPACES[key.op].default(key, family), "heuristic")


def taken_over(entry: Entry, key: Key, family: str) -> Any:
    """What an entry of a similar key says for this one: its config fitted, or the heuristic where it kept its own."""
    space = SPACES[key.op]
    return space.default(key, family) if entry.config == entry.default else space.fitted(entry.config, key, family)


def by_distance(key: Key, entries: Mapping[Key, Entry]) -> list[Key]:
    """The keys whose configs `key` could take over, the nearest first."""
    similar = SPACES[key.op].similar
    near = [k for k in entries if k[:3] == key[:3] and similar(k) == similar(key)]
    return sorted(near, key=lambda k: (key.distance(k), str(k)))


def config(key: Key, tensor: Tensor) -> Any:
    """The config for a launch on `tensor`."""
    found = _found.get((key, tensor.device))
    if found is None:
        asked = generation
        if (key, tensor.device) in _unfit:
            found = SPACES[key.op].default(key, family(tensor.device))
        else:
            found = origin(key, tensor.device).config
        for choose in _overrides:
            found = choose(key, found)
        if len(_found) >= 4096:
            _found.clear()
        if asked == generation:  # else another thread has changed what is in use meanwhile
            _found[key, tensor.device] = found
    return found


def reject(key: Key, device: torch.device, reason: Exception, planned: int) -> bool:
    """Put the config of a file that cannot be launched out of use, and report it; False where it came from elsewhere.

    A nearest key's config was measured on another problem, and a packaged one with another compiler. `planned` is the
    generation of the launch: one that was planned before another thread rejected the config has that config too.
    """
    if (key, device) in _unfit:
        return planned <= _unfit[key, device]
    found = origin(key, device)
    if _overrides or found.path is None:
        return False
    report(found.path, f"it does not fit {key}: {reason}", f", its config for {found.key},")
    _unfit[key, device] = generation
    _renew()
    return True


@contextlib.contextmanager
def override(choose: Callable[[Key, Any], Any]) -> Iterator[None]:
    """Inside, a launch gets `choose(key, config)`, config being what it would have got: for trying configs out.

    Raises TypeError where choose is no function.
    """
    if not callable(choose):
        raise TypeError(f"override: choose is {what(choose)}; accepted is a function of (key, config)")
    _overrides.append(choose)
    _renew()
    try:
        yield
    finally:
        _overrides.remove(choose)
        _renew()
