"""What `conntrackd top` shows: the connections, or groups of them, that lead by rate, bytes, packets or age.

Only these go to the client, however many connections there are. All of them are looked at, a few per turn of the loop.
A rate is what was carried since the walk before: what the connections had carried then is kept, for those that were
active, until nobody has asked for a while.
"""

import heapq
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Final

import msgspec

from conntrackd import api
from conntrackd.core.conn import Conn
from conntrackd.core.tuples import destination, source
from conntrackd.daemon import flowrows
from conntrackd.daemon.control import MORE, Asked, arguments
from conntrackd.daemon.flowanswers import Chosen
from conntrackd.daemon.links import Links
from conntrackd.hooks import Firewall

GROUPS_MAX: Final = 16_384  # what comes on top is one group without a name
ACTIVE_MS: Final = (
    10_000  # a connection that was quiet for longer has no rate when it speaks again, until the next walk
)
ACTIVE_MAX: Final = 65_536
BETWEEN_MS: Final = 500  # walks that are closer together measure since the same one
FORGET_MS: Final = 30_000
COSTLIER: Final = 8  # counting a connection, compared with asking a filter of it

Key = str | bytes | tuple[int, int]  # of a group: a rule, an address, or the two zones


class Sample:
    """What active connections had carried at one time, by id."""

    def __init__(self, at_ms: int) -> None:
        self.at_ms = at_ms
        self.carried: dict[int, int] = {}


class Group:
    """Connections that have something in common."""

    def __init__(self) -> None:
        self.flows = self.packets = self.bytes = self.moved = self.oldest_ms = 0

    def count(self, ct: Conn, carried: int, moved: int) -> None:
        """Count one that carried so much, and of it so much since the walk before."""
        if self.flows == 0 or ct.created_ms < self.oldest_ms:
            self.oldest_ms = ct.created_ms
        self.flows += 1
        self.packets += ct.packets_orig + ct.packets_reply
        self.bytes += carried
        self.moved += moved


class TopAnswers:
    """Answers `top`. `now_ms` is set by the loop whenever it wakes."""

    def __init__(self, fw: Firewall, links: Links) -> None:
        self.now_ms = 0
        self._fw = fw
        self._links = links
        self._before: Sample | None = None
        self._asked_ms = 0

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct] | None:
        """Begin to answer; None if something else is asked."""
        if asked.command != "top":
            return None
        args = arguments(asked, api.TopArgs)
        return self._top(args, Chosen(args.filter, self._fw, self._links))

    def tick(self) -> None:
        """Forget what nobody asks for any more; to be called about once a second."""
        if self._before is not None and self.now_ms - self._asked_ms > FORGET_MS:
            self._before = None

    def _top(self, args: api.TopArgs, chosen: Chosen) -> Iterator[msgspec.Struct]:
        self._asked_ms = begun_ms = self.now_ms
        before, sample = self._before, Sample(begun_ms)
        was, now = before.carried if before is not None else {}, sample.carried
        total = Group()
        groups: dict[Key, Group] = {}
        leading: list[tuple[tuple[int, int], int, int, Conn]] = []
        at_once = left = max(1, chosen.at_once // COSTLIER)
        for ct in self._fw.net.table.connections():
            left -= 1
            if not left:
                left = at_once
                yield MORE
            if ct.expires_ms <= self.now_ms:
                continue
            carried = ct.bytes_orig + ct.bytes_reply
            moved = 0
            if begun_ms - ct.seen_ms < ACTIVE_MS:
                if before is not None:
                    moved = carried - was.get(ct.id, 0 if ct.created_ms >= before.at_ms else carried)
                if len(now) < ACTIVE_MAX:
                    now[ct.id] = carried
            if not chosen.matches(ct, ct, self.now_ms):
                continue
            total.count(ct, carried, moved)
            if args.by != "flow":
                key = self._key(ct, args.by)
                group = groups.get(key)
                if group is None:
                    group = groups.setdefault(key if len(groups) < GROUPS_MAX else "", Group())
                group.count(ct, carried, moved)
                continue
            rank = _flow_rank(args.sort, ct, carried, moved)
            if len(leading) < args.limit:
                heapq.heappush(leading, (rank, ct.id, moved, ct))
            elif rank > leading[0][0]:
                heapq.heapreplace(leading, (rank, ct.id, moved, ct))
        took_ms = self.now_ms - before.at_ms if before is not None else 0
        if before is None or begun_ms - before.at_ms >= BETWEEN_MS:
            self._before = sample
        yield api.Top(
            flows=self._fw.net.table.count,
            chosen=total.flows,
            packets=total.packets,
            bytes=total.bytes,
            rate=_rate(total.moved, took_ms),
        )
        for _, _, moved, ct in sorted(leading, reverse=True):
            flow = flowrows.flow(self._fw, ct, self.now_ms, self._links.interface)
            yield api.TopFlow(flow=flow, rate=_rate(moved, took_ms))
        for key, group in heapq.nlargest(args.limit, groups.items(), key=lambda item: _group_rank(args.sort, item[1])):
            yield api.TopGroup(
                by=args.by,
                key=self._name(key),
                flows=group.flows,
                packets=group.packets,
                bytes=group.bytes,
                rate=_rate(group.moved, took_ms),
                age_seconds=(self.now_ms - group.oldest_ms) // 1000,
            )

    def _key(self, ct: Conn, by: str) -> Key:
        """Choose the group that a connection is of."""
        if by == "rule":
            return ct.rule
        if by == "src":
            return source(ct.orig)
        if by == "dst":
            return destination(ct.orig)
        ruleset, ipv6 = self._fw.ruleset, len(ct.orig) == 37
        from_zone = ruleset.zone(ct.iif, int.from_bytes(source(ct.orig), "big"), ipv6)
        return from_zone, ruleset.zone(ct.oif, int.from_bytes(destination(ct.orig), "big"), ipv6)

    def _name(self, key: Key) -> str:
        """Write what the connections of a group have in common."""
        if isinstance(key, str):
            return key
        if isinstance(key, bytes):
            return inet_ntop(AF_INET if len(key) == 4 else AF_INET6, key)
        names = {number: name for name, number in self._fw.ruleset.zones.items()}
        return " > ".join(names.get(number, "no zone") for number in key)


def _flow_rank(sort: str, ct: Conn, carried: int, moved: int) -> tuple[int, int]:
    """Say how far in front a connection is in an order; where it is even, the bytes decide."""
    if sort == "rate":
        return moved, carried
    if sort == "age":
        return -ct.created_ms, carried
    return (ct.packets_orig + ct.packets_reply if sort == "packets" else carried), carried


def _group_rank(sort: str, group: Group) -> tuple[int, int]:
    """Say how far in front a group is in an order; where it is even, the bytes decide."""
    if sort == "rate":
        return group.moved, group.bytes
    if sort == "age":
        return -group.oldest_ms, group.bytes
    if sort == "packets":
        return group.packets, group.bytes
    return (group.flows if sort == "flows" else group.bytes), group.bytes


def _rate(moved: int, took_ms: int) -> int | None:
    return moved * 1000 // took_ms if took_ms > 0 else None
