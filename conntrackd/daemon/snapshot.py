"""A snapshot: what would be lost with the process, in a form that outlives it, as a file or in memory.

    magic, version                           16 bytes
    blocks: kind, length, checksum, content  9 bytes and the content, whose CRC32c covers kind and length, too
    the last block: how many there were before it

The content is JSON where it is small, rows (core/rows.py) where it is large. Rows are written a slice at a time while
packets go on, so each connection is as it was when its turn came; times are those of the monotonic clock at the
writer, and the head says what the other clocks said then.

A snapshot is input: what is not whole is refused as a whole, with a sentence, before anything of it counts.
"""

import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO, Final, NamedTuple

import google_crc32c
import msgspec

from conntrackd.core.conn import Conn
from conntrackd.core.rows import Names, pack_conn, pack_conns, pack_expect
from conntrackd.core.stats import Stats
from conntrackd.hooks import Firewall
from conntrackd.policy.sets import AddressSet

MAGIC: Final = b"conntrackd"
VERSION: Final = 1
START: Final = struct.Struct("<10s4xH")
HEADER: Final = struct.Struct("<BII")
COVERED: Final = struct.Struct("<BI")  # of the header, by the checksum
BLOCK_MAX: Final = 1 << 20
BLOCK: Final = 1 << 16  # rows are collected to about this size
SLICE: Final = 128  # rows made at a time; one takes one to three microseconds
RULES_AT_ONCE: Final = 1000

# Kinds of blocks, in the order in which they come. Names come before the rows that name them.
HEAD: Final = 1
NAMES: Final = 2
CONNS: Final = 3
EXPECTS: Final = 4
ENTRIES: Final = 5
REVOKED: Final = 6
RULES: Final = 7
TOTALS: Final = 8
END: Final = 9
ENDED: Final = 0  # in changes only, and first: what has ended makes room for what has begun

# An address that was added to a set: the set's name, whether it is IPv6, length of the prefix, address, when it ends.
ENTRY: Final = struct.Struct("<HBB16sq")
# A tuple whose connection a new policy ended: its length, the tuple, until when it is remembered.
REVOCATION: Final = struct.Struct("<B39sq")
# A connection that has ended: id, zone, length of its original tuple, the tuple.
ENDING: Final = struct.Struct("<QHB37s")

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class SnapshotError(Exception):
    """A snapshot can't be used; the text says why, as the end of a sentence."""


Time = Annotated[int, msgspec.Meta(gt=-(1 << 60), lt=1 << 60)]


class Moment(NamedTuple):
    """What the clocks say. The monotonic one begins anew with the machine, so it counts only for the same boot."""

    mono_ms: int
    wall_ms: int
    boot_id: str


class Head(msgspec.Struct):
    """When it was written, and under which policy."""

    mono_ms: Time
    wall_ms: Time
    boot_id: str
    generation: Annotated[int, msgspec.Meta(ge=0, lt=1 << 30)]
    config: str  # fingerprint of the configuration
    exact: bool  # no packet has passed since: who wrote it judged no more, and nothing passed by


class RuleTotals(msgspec.Struct):
    """The counters of a rule."""

    name: str
    hits: int
    hit_bytes: int
    last_hit_ms: int
    flows: int
    packets: int
    bytes: int


class Totals(msgspec.Struct):
    """All other counters."""

    last_id: int
    stats: dict[str, int | list[int]]
    drops: dict[str, int]


# dir() and not vars(): a compiled class keeps its attributes in no dictionary.
STATS: Final = tuple(
    name for name in dir(Stats()) if not name.startswith("_") and isinstance(getattr(Stats(), name), int | list)
)


# --- Writing ------------------------------------------------------------------------------------------------------


class Freezing:
    """A snapshot that is being written; `flows` are the connections so far."""

    def __init__(self, fw: Firewall, links: dict[int, str], moment: Moment, config: str, exact: bool) -> None:
        self.flows = 0
        self._fw = fw
        self._links = links
        self._head = Head(*moment, fw.ruleset.generation, config, exact)
        self._names = Names()
        self._rows: list[bytes] = []
        self._size = 0
        self._blocks = 0

    def pieces(self, unconfirmed: bool = False) -> Iterator[bytes]:
        """Make it a piece at a time, with b"" after each slice that was too little for one.

        `unconfirmed` is for who takes over at once: with connections whose first packet is on its way.
        """
        yield from self._begin()
        yield from self._connections(self._fw.net.table.connections())
        if unconfirmed:
            yield from self._unconfirmed()
        yield from self._all_else()

    def base(self) -> Iterator[bytes]:
        """Make what `changes` are told against later: the confirmed connections, and nothing else."""
        yield from self._begin()
        yield from self._connections(self._fw.net.table.connections())
        yield self._end()

    def changes(self, since_ms: int, ended: Iterator[bytes]) -> Iterator[bytes]:
        """Make what has changed since `base` was made at `since_ms`; `ended` are rows (ENDING) of what is no more.
        To be made in one go.

        A packet that was not let through counts as none: what it may have changed about its connection stays behind.
        """
        yield from self._begin()
        yield from self._sliced(ENDED, ended)
        yield from self._connections(self._fw.net.table.seen_since(since_ms))
        yield from self._unconfirmed()
        yield from self._all_else()

    def _begin(self) -> Iterator[bytes]:
        yield START.pack(MAGIC, VERSION)
        yield self._block(HEAD, msgspec.json.encode(self._head))

    def _connections(self, connections: Iterator[Conn]) -> Iterator[bytes]:
        labels = self._fw.net.table.labels
        while rows := pack_conns(connections, SLICE, labels, self._links, self._names):
            self.flows += len(rows)
            yield self._collect(CONNS, rows)
        yield self._rest(CONNS)

    def _unconfirmed(self) -> Iterator[bytes]:
        table = self._fw.net.table
        held = [*table.unconfirmed_old.values(), *table.unconfirmed.values()]
        yield from self._sliced(CONNS, (pack_conn(ct, 0, self._links, self._names) for ct in held))

    def _all_else(self) -> Iterator[bytes]:
        net = self._fw.net
        expectations = list(net.table.expectations.by_id.values())
        yield from self._sliced(EXPECTS, (pack_expect(expect, self._names) for expect in expectations))
        for entry in list(self._fw.ruleset.sets.values()):
            yield from self._sliced(ENTRIES, _entries(entry, self._names.number(entry.name)))
        revoked = list(self._fw.revoked.items())
        yield from self._sliced(REVOKED, (REVOCATION.pack(len(key), key, until_ms) for key, until_ms in revoked))
        rules = [
            RuleTotals(
                rule.name, rule.hits, rule.hit_bytes, rule.last_hit_ms,
                rule.flows, rule.account.packets, rule.account.bytes,
            )
            for rule in self._fw.ruleset.rules
        ]  # fmt: skip
        for at in range(0, len(rules), RULES_AT_ONCE):
            yield self._block(RULES, msgspec.json.encode(rules[at : at + RULES_AT_ONCE]))
        totals = Totals(net.table.last_id, {name: getattr(net.stats, name) for name in STATS}, self._fw.drop_counts)
        yield self._block(TOTALS, msgspec.json.encode(totals))
        yield self._end()

    def _end(self) -> bytes:
        return self._block(END, self._blocks.to_bytes(8, "little"))

    def _block(self, kind: int, content: bytes) -> bytes:
        self._blocks += 1
        return block(kind, content)

    def _sliced(self, kind: int, rows: Iterator[bytes]) -> Iterator[bytes]:
        while some := list(islice(rows, SLICE)):
            yield self._collect(kind, some)
        yield self._rest(kind)

    def _collect(self, kind: int, rows: list[bytes]) -> bytes:
        """Take rows; returns a block when there are enough for one."""
        self._rows += rows
        self._size += sum(map(len, rows))
        return self._rest(kind) if self._size >= BLOCK else b""

    def _rest(self, kind: int) -> bytes:
        """Make blocks of what was collected, names first."""
        made = b""
        if self._names.fresh:
            made = self._block(NAMES, msgspec.json.encode(self._names.fresh))
            self._names.fresh = []
        if self._rows:
            made += self._block(kind, b"".join(self._rows))
            self._rows, self._size = [], 0
        return made


def ending(ct: Conn) -> bytes:
    """Write the row of a connection that has ended."""
    return ENDING.pack(ct.id, ct.zone, len(ct.orig), ct.orig)


def _entries(entry: AddressSet, number: int) -> Iterator[bytes]:
    for (ipv6, address, length), ends_ms in list(entry.added.items()):
        yield ENTRY.pack(number, ipv6, length, address.to_bytes(16, "big"), ends_ms)


def block(kind: int, content: bytes) -> bytes:
    """Write a block."""
    return HEADER.pack(kind, len(content), _checksum(kind, content)) + content


def _checksum(kind: int, content: bytes) -> int:
    checksum: int = google_crc32c.extend(google_crc32c.value(COVERED.pack(kind, len(content))), content)
    return checksum


# --- Reading ------------------------------------------------------------------------------------------------------


def check(file: BinaryIO) -> Head:
    """Make sure that a snapshot is one, and whole; returns its head. Raises SnapshotError, and OSError."""
    file.seek(0)
    start = file.read(START.size)
    if len(start) < START.size or not start.startswith(MAGIC):
        raise SnapshotError("is no snapshot of conntrackd")
    _, version = START.unpack(start)
    if version != VERSION:
        age = "a newer" if version > VERSION else "an older"
        raise SnapshotError(f"was written by {age} conntrackd (format {version}, this one reads {VERSION})")
    head = None
    before = ENDED
    for count, (kind, content) in enumerate(blocks(file)):
        if count == 0 and kind == HEAD:
            try:
                head = msgspec.json.decode(content, type=Head)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise SnapshotError(f"has a head that is not understood: {error}") from None
        elif kind == END:
            if head is None or content != count.to_bytes(8, "little") or file.read(1):
                break
            return head
        elif kind != NAMES:
            if kind < before:
                raise SnapshotError("is damaged: its blocks are out of order")
            before = kind
    raise SnapshotError("is torn: it does not end where it should")


def blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Read all blocks as they come, none larger than BLOCK_MAX. Raises SnapshotError at the first that is broken."""
    at = file.seek(START.size)
    while header := file.read(HEADER.size):
        if len(header) < HEADER.size:
            raise SnapshotError(f"is torn at byte {at}")
        kind, length, checksum = HEADER.unpack(header)
        content = file.read(length) if length <= BLOCK_MAX else b""
        if len(content) != length or _checksum(kind, content) != checksum:
            raise SnapshotError(f"is torn at byte {at}" if length > len(content) else f"is damaged at byte {at}")
        at += HEADER.size + length
        yield kind, content


def boot_id() -> str:
    """Name the time since the machine was started; "" where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
