"""The file that a snapshot stands in: written beside the packets, replaced as a whole, set aside when it is no good.

A new one is written under another name, brought to the disk, and only then takes the place of the old one: whenever the
machine dies, there is a whole one. All that waits for the disk is in a thread.
"""

import contextlib
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, Final

import structlog

from conntrackd.daemon.snapshot import SnapshotError

NAME: Final = "snapshot"
KEPT_ASIDE: Final = 3
SIZE_MAX: Final = 1 << 32

WriteDisk = Callable[[int, memoryview], int]  # as os.write

log = structlog.get_logger()


class StateFile:
    """The snapshot in a directory that is ours alone while the daemon runs. Raises OSError where there is none."""

    def __init__(self, directory: str, write: WriteDisk = os.write) -> None:
        self._write = write
        self.path = Path(directory) / NAME
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._directory)
            raise

    def open(self) -> BinaryIO:
        """Open the snapshot for reading. Raises FileNotFoundError, OSError, and SnapshotError for what is none."""
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory)
        file = os.fdopen(fd, "rb")
        found = os.fstat(fd)
        reason = ""
        if not stat.S_ISREG(found.st_mode):
            reason = "is no file"
        elif found.st_mode & 0o022:
            reason = "may be written by others than its owner"
        elif found.st_size > SIZE_MAX:
            reason = f"is larger than {SIZE_MAX >> 30} GB"
        if reason:
            file.close()
            raise SnapshotError(reason)
        return file

    def set_aside(self) -> str:
        """Rename the snapshot, so that it can be looked into; the oldest of those kept goes. Returns the new name."""
        names = [f"{NAME}.bad.{number}" for number in range(1, KEPT_ASIDE + 1)]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            with contextlib.suppress(FileNotFoundError):
                self._rename(newer, older)
        self._rename(NAME, names[0])
        return str(self.path.with_name(names[0]))

    def write(self) -> "Writing":
        """Begin to write a new snapshot."""
        return Writing(self._directory, self._write)

    def close(self) -> None:
        """Let others have the directory."""
        os.close(self._directory)

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)


class Writing:
    """A snapshot on its way to the disk, in a thread of its own. `done` says that it is over, `error` how it failed."""

    def __init__(self, directory: int, write: WriteDisk) -> None:
        self.done = False
        self.error = ""
        self.given = 0  # bytes that the thread was given, and that it has written
        self.written = 0
        self._directory = os.dup(directory)
        self._write_disk = write
        self._abandoned = False
        self._pieces: SimpleQueue[bytes] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="snapshot", daemon=True)
        self._thread.start()

    def waiting(self) -> int:
        """Count the bytes that are not written yet."""
        return self.given - self.written

    def give(self, piece: bytes) -> None:
        """Have a piece written; b"" after the last one."""
        self.given += len(piece)
        self._pieces.put(piece)

    def abandon(self) -> None:
        """Write no more, and leave the snapshot as it was."""
        self._abandoned = True
        self._pieces.put(b"")

    def wait(self, seconds: float) -> None:
        """Wait until it is over, but not for ever."""
        self._thread.join(seconds)

    def _work(self) -> None:
        new = f"{NAME}.new"
        try:
            try:
                self._write(new)
                os.rename(new, NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                os.fsync(self._directory)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(new, dir_fd=self._directory)
                raise
        except OSError as error:
            self.error = error.strerror or str(error)
        finally:
            os.close(self._directory)
            self.done = True

    def _write(self, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=self._directory), "wb", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            while piece := self._pieces.get():
                left = memoryview(piece)
                while left:
                    left = left[self._write_disk(file.fileno(), left) :]
                self.written += len(piece)
            if self._abandoned:
                raise OSError("abandoned")
            os.fsync(file.fileno())
