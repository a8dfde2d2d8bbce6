"""Locks of folders, so that one run at a time writes to a folder; the kernel releases a dead process's lock.

    hold(folder, world)    for all ranks of a run, until the last of their processes ends
    take(folder)           for one process
    release()              all locks of this process

The lock is flock(2) on the file .lock of the folder; the file stays and has no meaning by itself. Processes
of one machine always see each other's locks. Machines that share a folder see them over NFS (Linux sends
flock to the server as a lock on the whole file), CephFS, GPFS, and Lustre mounted with `-o flock`. They do
not with the mount options `nolock`, `local_lock=flock` or `-o localflock`, or on object stores mounted as
files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from thinkrl import UserError
from thinkrl.distributed import World, on_main, together

GRACE_SECONDS = 10.0  # a killed run's processes may need this long to free their memory and the lock
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_held: dict[Path, IO[str]] = {}


def hold(folder: Path, world: World) -> None:
    """Make the folder and lock it for this run. Collective.

    Rank 0 takes an exclusive lock, then shares it with the other ranks. So a run cannot start while any
    process of an earlier one lives. Raises UserError, on all ranks, with the process that has the lock.
    """
    on_main(_take_and_share, folder)
    together(_share, folder, world)


def _take_and_share(folder: Path) -> None:
    take(folder)
    _lock(_held[folder.resolve()], fcntl.LOCK_SH)


def take(folder: Path) -> None:
    """Make the folder and lock it for this process. Raises UserError with the process that has the lock."""
    file = _open(folder)
    deadline = time.monotonic() + GRACE_SECONDS
    while not _lock(file, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is in use by {_holder(file)}: wait until it has ended, or stop it first"
            )
        time.sleep(0.1)
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
    file.flush()


def release() -> None:
    """Release all locks of this process."""
    while _held:
        _held.popitem()[1].close()


def _share(folder: Path, world: World) -> None:
    """Take a shared lock on a folder that rank 0 has locked."""
    if world.main:
        return
    if not folder.is_dir():
        raise UserError(
            f"{folder}: rank 0 has made this folder, but {socket.gethostname()} does not see it: all "
            "machines of a run need --runs_dir (or --out) on a shared file system"
        )
    if not _lock(file := _open(folder), fcntl.LOCK_SH):
        raise UserError(f"{folder} was taken by {_holder(file)} at the same moment: start again")


def _open(folder: Path) -> IO[str]:
    """Open the lock file, or return the one that this process has already locked."""
    if folder.resolve() not in _held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _held[folder.resolve()] = open(folder / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"the folder {folder} cannot be written ({error.strerror}): choose another --runs_dir (or "
                "--out)"
            ) from None
    return _held[folder.resolve()]


def _lock(file: IO[str], how: int) -> bool:
    """Whether the lock was given. On a file system without locks, print a warning and return True."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{file.name}: this file system has no locks: nothing would refuse a second start of this run")
    return True


def _holder(file: IO[str]) -> str:
    """Describe the process that has the lock, from the file's text; closes the file."""
    file.seek(0)
    text = file.read()
    _held.pop(Path(file.name).parent.resolve())
    file.close()
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError):  # it has not written its text yet
        return "another process"
