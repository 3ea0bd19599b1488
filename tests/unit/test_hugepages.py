"""What has grown is put into huge pages."""

import mmap
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conntrackd.daemon import hugepages
from conntrackd.daemon.hugepages import GROWN, HUGE, HugePages, allowed, ranges

MAPS = """\
55aeb8779000-55aeb8979000 rw-p 00000000 fe:00 260850                     /usr/bin/python3
55aeb9000000-55aeb9500000 rw-p 00000000 00:00 0                          [heap]
7f0000100000-7f0000700000 rw-p 00000000 00:00 0
7f0001100000-7f0001300000 rw-p 00000000 00:00 0
7f0002000000-7f0003000000 rw-s 00000000 00:01 1                          /dev/zero (deleted)
7f0004000000-7f0005000000 ---p 00000000 00:00 0
7fff00000000-7fff01000000 rw-p 00000000 00:00 0                          [stack]
"""

# Objects as small as connections, far more than is worth a look. Not all of their memory lies so that huge pages fit.
GROW = f"""
import re, time
from pathlib import Path
from conntrackd.daemon.hugepages import HugePages
def huge():
    return int(re.search(r"AnonHugePages: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) << 10
pages = HugePages()
pages.tick()
before = huge()
kept = [bytes(200) for _ in range({8 * GROWN} // 256)]
pages.tick()
end_s = time.monotonic() + 60
while huge() - before < {4 * GROWN} and time.monotonic() < end_s:
    time.sleep(0.05)
print(huge() - before)
"""


def test_ranges_are_the_whole_huge_pages_of_memory_that_is_our_own() -> None:
    assert ranges(MAPS) == [(0x55AEB9000000, 0x55AEB9400000), (0x7F0000200000, 0x7F0000600000)]
    assert all(address % HUGE == 0 for part in ranges(MAPS) for address in part)


def test_the_maps_of_a_real_process_are_understood() -> None:
    with mmap.mmap(-1, 4 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        assert sum(end - start for start, end in ranges(Path("/proc/self/maps").read_text())) >= 3 * HUGE


def test_without_a_descriptor_or_a_thread_it_stays_in_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugepages, "allowed", lambda: True)
    pages = HugePages()
    with monkeypatch.context() as patch:
        patch.setattr(hugepages, "STATM", Path("/proc/self/fd/not there"))
        pages.tick()
    monkeypatch.setattr(hugepages, "resident", lambda: 1 << 60)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    pages.tick()


def refuse(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.skipif(not allowed(), reason="this machine has no transparent huge pages")
def test_what_grows_is_collapsed() -> None:
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\n", done.stdout)
    assert int(done.stdout) >= 4 * GROWN
