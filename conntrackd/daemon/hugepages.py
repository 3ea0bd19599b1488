"""Memory in huge pages: with many connections the walk through the page tables takes longer than what it leads to.

Python takes memory in pieces of one megabyte, too small for a page of two when they are first written to. So what has
grown is collapsed into huge pages now and then, in a thread: the system call copies one page after the other, and
Python goes on meanwhile. A small table never gets here, and where the administrator has set
/sys/kernel/mm/transparent_hugepage/enabled to `never`, nothing is done.
"""

import ctypes
import os
import threading
from pathlib import Path
from typing import Final

from conntrackd.daemon.mmsg import libc

MADV_COLLAPSE: Final = 25  # since Linux 6.1
HUGE: Final = 2 << 20  # bytes of a huge page of x86-64, and of arm64 with small pages of 4 kB
GROWN: Final = 16 << 20  # bytes by which the process must have grown before it is worth to look again
ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS: Final = Path("/proc/self/maps")
STATM: Final = Path("/proc/self/statm")


class HugePages:
    """Looks about once a second whether the process has grown, and has what is new collapsed."""

    def __init__(self) -> None:
        self._allowed = allowed()
        self._looked = resident()
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Begin to collapse if there is something to."""
        if not self._allowed or (self._thread is not None and self._thread.is_alive()):
            return
        try:
            bytes_now = resident()
            if bytes_now - self._looked < GROWN:
                self._looked = min(self._looked, bytes_now)
                return
            self._looked = bytes_now
            thread = threading.Thread(target=collapse, name="huge pages", daemon=True)
            thread.start()
            self._thread = thread
        except (OSError, RuntimeError):  # no descriptor or no thread to be had: it stays in small pages
            return


def collapse() -> None:
    """Collapse all memory that fills huge pages; what the kernel has none left for stays as it is."""
    try:
        maps = MAPS.read_text()
    except OSError:
        return
    for start, end in ranges(maps):
        # Parts that nothing was written to are refused, and so is all by a kernel that is too old.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


def allowed() -> bool:
    """Whether the administrator lets programs have huge pages."""
    try:
        return "[never]" not in ENABLED.read_text()
    except OSError:
        return False  # a kernel without


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ranges(maps: str) -> list[tuple[int, int]]:
    """List what of the process's own memory huge pages fit in, as [start, end): see proc_pid_maps(5)."""
    found = []
    for line in maps.splitlines():
        addresses, mode, _, _, inode, *name = line.split(maxsplit=5)
        if mode != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        first, last = (int(address, 16) for address in addresses.split("-"))
        start, end = -(-first // HUGE) * HUGE, last // HUGE * HUGE
        if start < end:
            found.append((start, end))
    return found
