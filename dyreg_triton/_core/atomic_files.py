"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` if the block ends well, and is removed if it does not.

    The name is in the same folder, because a file moves in one step only within a file system. An OSError of the block
    comes out as one that names `path`: a full disk names no file, and whoever reads of it knows no temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(temporary):
            raise  # of another file, which it names
        number, told = error.errno or errno.EIO, error.strerror or str(error)
        raise OSError(number, told, str(path)) from error  # its class is the number's
    finally:
        temporary.unlink(missing_ok=True)
