"""What every command of this project does with its standard streams; docs/README.md lists the exit statuses."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

LOST = 74  # as EX_IOERR of sysexits.h
CLOSED = 141  # as a shell says of a command that SIGPIPE has ended

P = ParamSpec("P")


class _Unprinted(BaseException):
    """Standard output has failed. No Exception: nothing that a command catches on its way may take it for its own."""


class _Stream:
    """A text stream that escapes what its encoding does not have, and tells `failed` where it cannot be written."""

    def __init__(self, stream: Any, failed: Callable[[Exception], None]):
        self._stream, self._failed = stream, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of it."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._do(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """What the stream still holds."""
        self._do(self._stream.flush)

    def isatty(self) -> bool:
        """Whether somebody looks at it now; a closed one can be asked too."""
        return not getattr(self._stream, "closed", False) and self._stream.isatty()

    def _do(self, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            # What it still holds has to go somewhere: Python flushes it at the end, and would fail then.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())
            self._failed(error)


def _unprinted(error: Exception) -> None:
    raise _Unprinted from error


def _dropped(error: Exception) -> None:
    """There is nowhere left to say it, and what the command does is worth more than what it says on the way."""


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Make `main` a command: what cannot be encoded is escaped, and no stream that fails looks like a refusal.

    A stream that was closed from the start takes everything and keeps nothing.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        with contextlib.ExitStack() as stack:

            def given(stream: Any) -> Any:  # None where it was closed from the start
                return stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream

            out, err = _Stream(given(sys.stdout), _unprinted), _Stream(given(sys.stderr), _dropped)
            stack.callback(err.flush)
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            try:
                try:
                    status = main(*args, **kwargs)
                except SystemExit:  # the parser's, which may have printed the help
                    out.flush()
                    raise
                out.flush()
            except _Unprinted as failure:
                if isinstance(failure.__cause__, ConnectionError):
                    return CLOSED
                print(f"standard output cannot be written: {failure.__cause__}", file=sys.stderr)
                return LOST
            return status

    return run
