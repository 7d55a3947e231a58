"""Files that only this user can have written: what is read here may be unpickled, which runs what the file says.

A file begins with its name and a SHA-256 of all that follows, so that one that was cut off, changed or renamed is told
from a good one before any of it is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

from spcompile.plain_text import one_line

log = logging.getLogger(__name__)
_FORMAT = b"spcompile file 1"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Damaged(ValueError):
    """A file of this user that is not what was written under its name."""


def are_own(*folders: Path) -> bool:
    """Whether folders, those that exist, belong to this user and nobody else may write to them; warns where not."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            if not _is_own(folder, os.lstat(folder)):
                return False
    return True


def read_own(path: Path) -> bytes | None:
    """What `write_own` left; None where there is no file, or one that somebody else may have written.

    Raises:
        Damaged: cut off, changed or renamed.
        OSError: it cannot be read.
    """
    if not are_own(path.parent):
        return None
    try:
        # What is no plain file is not waited for, and the file that was looked at is the file that is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged("no plain file")
        if not _is_own(path, status):
            return None
        content = file.read()
    head, _, rest = content.partition(b"\n")
    if head != _head(path.name, rest):
        raise Damaged("cut off, changed or renamed")
    return rest


def write_own(path: Path, content: bytes) -> None:
    """Leave a file as a whole or not at all, readable and writable by this user alone; so are folders made for it.

    Raises:
        OSError: the disk is full, or nothing may be written there.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not are_own(path.parent):
        return
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with open(descriptor, "wb") as file:
            file.write(_head(path.name, content) + b"\n" + content)
        os.replace(made, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise


def _head(name: str, content: bytes) -> bytes:
    return b" ".join((_FORMAT, name.encode(), hashlib.sha256(content).hexdigest().encode()))


def _is_own(path: Path, status: os.stat_result) -> bool:
    if stat.S_ISLNK(status.st_mode):
        _warn(path, "is a link", "remove it")
    elif status.st_uid != os.geteuid():
        _warn(path, f"belongs to user {status.st_uid}, not to {os.geteuid()}", "remove it, or name another folder")
    elif status.st_mode & _WRITABLE_BY_OTHERS:
        _warn(path, "may be written by other users", f"chmod go-w '{path}'")
    else:
        return True
    return False


@functools.cache
def _warn(path: Path, found: str, mend: str) -> None:
    """Once for each path in a process."""
    log.warning(
        "no finished programs are read from or written to disk: %s %s. To mend it: %s. "
        "TORCHINDUCTOR_CACHE_DIR names the folder.",
        one_line(str(path)),
        found,
        one_line(mend),
    )
