"""The one exception this package raises for input it cannot use, and what it makes of a disk that refuses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EmbedLensError(ValueError):
    """One sentence that says what is wrong and what to do about it; the command line prints it without a traceback."""

    exit_code = 2  #: Of the command line; a chapter that fails has 1


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Where `path` is written: a full, read-only or missing disk is one sentence that names it.

    >>> with writing("out.csv"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
        ...
    embedlens.errors.EmbedLensError: cannot write out.csv (No space left on device): free space on that disk, or ...
    """
    try:
        yield
    except OSError as error:
        raise EmbedLensError(refused(error, f"cannot write {path}")) from error


def refused(error: OSError, what: str) -> str:
    """What an operating system's refusal means and what helps, in one sentence that begins with `what`."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    barred = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    help_ = (
        "free space on that disk, or pass another folder to write to; what was written before is kept"
        if full
        else "pass a place that may be read and written; what was written before is kept"
        if barred
        else "check the path"
    )
    return f"{what} ({error.strerror or ' '.join(str(error).split()) or type(error).__name__}): {help_}"
