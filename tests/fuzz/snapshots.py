"""Fuzzing of the snapshot's reader: whatever the bytes are, it refuses them or leaves the table in order and bounded.

The bytes are a byte of settings and a file, or blocks without their checksums, which then get the right ones: a kind,
two bytes of length and the content.
"""

import io
import tracemalloc
from typing import Final

from conntrackd.config import parse
from conntrackd.const import NF_INET_POST_ROUTING, NF_INET_PRE_ROUTING
from conntrackd.core.conntrack import gc
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.links import Links
from conntrackd.daemon.restore import Restoring
from conntrackd.daemon.snapshot import (
    END,
    MAGIC,
    START,
    VERSION,
    Freezing,
    Moment,
    SnapshotError,
    block,
    blocks,
)
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from tests.fuzz.invariants import check_table
from tests.fuzz.seeds import conversations

WHOLE: Final = 0x01  # of the settings: a file as it is
SMALL_LIMITS: Final = 0x02
REBOOTED: Final = 0x04
START_MS: Final = 10_000_000
MEMORY_MAX: Final = 32 << 20  # for an input of some kilobytes

CONFIG: Final = parse(
    b"""
version = 1
[sets.banned]
size = 2
[[rule]]
name = "ftp"
protocol = "tcp"
helper = "ftp"
action = "accept"
[[rule]]
name = "rest"
action = "accept"
""",
    "fuzz.toml",
)


def firewall(settings: int) -> Firewall:
    sysctl = Sysctl()
    if settings & SMALL_LIMITS:
        sysctl.max = sysctl.expect_max = sysctl.max_per_source = sysctl.max_per_zone = 3
    return Firewall(Conntrack(sysctl), compile_ruleset(CONFIG, 1))


def links() -> Links:
    made = Links()
    made.close()
    made.names = {1: "lan", 2: "wan"}
    return made


def sealed(data: bytes) -> bytes:
    """A snapshot of these blocks, with the right checksums."""
    made = []
    at = 0
    while at + 3 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 3], "big")
        made.append(block(data[at], data[at + 3 : at + 3 + size]))
        at += 3 + size
    return START.pack(MAGIC, VERSION) + b"".join(made) + block(END, len(made).to_bytes(8, "little"))


def snapshot(data: bytes) -> None:
    """Read it, and let time go on."""
    settings = data[0] if data else 0
    file = io.BytesIO(data[1:] if settings & WHOLE else sealed(data[1:]))
    fw = firewall(settings)
    now = Moment(START_MS, 0, "another boot" if settings & REBOOTED else "boot")
    tracemalloc.start()
    try:
        Restoring(fw, links()).read(file, now)
    except SnapshotError:
        assert fw.net.table.count == 0
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY_MAX, peak
    if settings & SMALL_LIMITS:
        assert fw.net.table.count <= 3
    now_ms = START_MS
    for _ in range(4):
        check_table(fw.net, now_ms, lives=False)
        gc(fw.net, now_ms)
        now_ms += 40_000


def seeds() -> list[bytes]:
    """Snapshots of what the conversations leave behind, as files and as blocks."""
    found = []
    for conversation in conversations():
        fw = firewall(0)
        for back, packet in conversation:
            iif, oif = (2, 1) if back else (1, 2)
            mark = pre_routing(fw, packet, NF_INET_PRE_ROUTING, iif, START_MS)
            post_routing(fw, packet, max(0, mark), NF_INET_POST_ROUTING, iif, oif, START_MS)
        fw.ruleset.sets["banned"].add(False, 7 << 24, 8, START_MS + 1000, START_MS)
        fw.revoked[bytes(13)] = START_MS + 1000
        file = b"".join(Freezing(fw, {1: "lan", 2: "wan"}, Moment(START_MS, 0, "boot"), "", exact=True).pieces(True))
        parts = [bytes((kind,)) + len(part).to_bytes(2, "big") + part for kind, part in blocks(io.BytesIO(file))]
        found += [bytes((WHOLE,)) + file, b"\0" + b"".join(parts[:-1]), bytes((REBOOTED,)) + b"".join(parts[:-1])]
    return found
