"""Memory in huge pages: with many connections the walk through the page tables takes longer than what it leads to.

Python takes memory in pieces of one megabyte, too small for a page of two when they are first written to. So what has
grown is collapsed into huge pages now and then, in a thread, a page per system call; Python goes on meanwhile. A small
table never gets here, and where the administrator has set /sys/kernel/mm/transparent_hugepage/enabled to `never`,
nothing is done.

While the kernel copies a page, a packet whose connection is in there waits. That is half a millisecond, unless the huge
page is memory that a virtual machine never used before: then its host must find 512 pages for it first, which takes ten
times as long. So a huge page is written to and given back before: it is the one that the kernel takes next.
"""

import ctypes
import mmap
import os
import threading
from pathlib import Path
from typing import Final

from conntrackd.daemon.mmsg import libc

MADV_COLLAPSE: Final = 25  # since Linux 6.1
MADV_POPULATE_WRITE: Final = 23  # since Linux 5.14
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
        spare = mmap.mmap(-1, 2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError):
        return
    with spare:
        within = ctypes.addressof(ctypes.c_char.from_buffer(spare))
        spare_page = -(-within // HUGE) * HUGE
        advise(spare_page, mmap.MADV_HUGEPAGE)
        for start, end in ranges(maps):
            for page in range(start, end, HUGE):
                advise(spare_page, MADV_POPULATE_WRITE)
                advise(spare_page, mmap.MADV_DONTNEED)
                # Parts that nothing was written to are refused, and so is all by a kernel that is too old.
                advise(page, MADV_COLLAPSE)


def advise(page: int, advice: int) -> None:
    """Tell the kernel something about a huge page, while the interpreter is free for others: see madvise(2)."""
    libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE), advice)


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
