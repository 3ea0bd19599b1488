"""Puts back what a snapshot holds: as it would be had the daemon gone on, with the time in between deducted.

What has expired meanwhile is left out, and so is what the limits have no room for, the least recently seen first.
Interfaces are found again by their names, rules too; a connection whose rule is gone goes on as after a reload.

After a crash packets have passed that the snapshot does not know of: TCP's numbers are taken as they come then.
"""

from collections.abc import Callable
from typing import Any, BinaryIO, Final

import msgspec

from conntrackd.const import CLOSED_TIMEOUT, IPS_ASSURED, IPS_CONFIRMED, IPS_HELPER
from conntrackd.core.account import Account
from conntrackd.core.expect import EXPECT_OK
from conntrackd.core.helpers import HELPERS
from conntrackd.core.proto.tcp_conn import TcpConn, forget_windows
from conntrackd.core.rows import ConnRow, read_conn, read_expect, row_end
from conntrackd.daemon.links import Links
from conntrackd.daemon.snapshot import (
    CONNS,
    ENDED,
    ENDING,
    ENTRIES,
    ENTRY,
    EXPECTS,
    NAMES,
    REVOCATION,
    REVOKED,
    RULES,
    TOTALS,
    Head,
    Moment,
    RuleTotals,
    Totals,
    blocks,
    check,
)
from conntrackd.hooks import REVOKED_MAX, REVOKED_MS, Firewall
from conntrackd.policy.sets import FOR_EVER

NO_LIMIT: Final = 1 << 24  # connections, where the configuration has none
DROP_REASONS_MAX: Final = 256
COUNT_MAX: Final = 1 << 63


class Restored:
    """What became of a snapshot."""

    def __init__(self, head: Head, now: Moment) -> None:
        self.generation = head.generation
        self.config = head.config
        self.exact = head.exact
        self.same_boot = head.boot_id == now.boot_id and head.boot_id != "" and head.mono_ms <= now.mono_ms
        away_ms = now.mono_ms - head.mono_ms if self.same_boot else now.wall_ms - head.wall_ms
        # A machine without a battery for its clock may know less of the time than before: nothing is deducted then.
        self.clock_backwards = away_ms < 0
        self.away_ms = max(0, away_ms)
        self.shift_ms = now.mono_ms - self.away_ms - head.mono_ms
        self.flows = 0
        self.expired = 0
        self.stale = 0  # TCP that was about to begin, and may have begun since: its next packet shows
        self.refused = 0  # by a limit, or because they are no connections
        self.expectations = 0
        self.addresses = 0


def nothing() -> None:
    """Tell nobody how it goes."""


class Restoring:
    """Puts a snapshot into a tracker, and then perhaps what has changed since.

    `progress` is called often, for whoever wants to know that we are alive.
    """

    def __init__(self, fw: Firewall, links: Links, progress: Callable[[], None] = nothing) -> None:
        self.fw = fw
        self.links = links
        self.progress = progress
        self.catching_up = False
        self.ended = 0  # connections that changes took out
        self.accounts: dict[str, Account] = {}  # of rules that are no more
        # What may be evicted goes in at last, in the order in which it was seen.
        self.evictable: list[ConnRow] = []
        there = list(fw.net.table.connections())
        self.announced = [(ct, ct.master.id) for ct in there if ct.master is not None]  # with the id of who did
        self.masters = {ct.id: ct for ct in there if ct.help is not None}
        self.limit = fw.net.sysctl.max or NO_LIMIT

    def read(self, file: BinaryIO, now: Moment) -> Restored:
        """Take in a snapshot; the tracker knows nothing yet. Raises SnapshotError before it has changed anything."""
        self.restored = Restored(check(file), now)
        self.now_ms = now.mono_ms
        self.names = [""]
        self.interfaces = {0: 0}  # index by number of the name
        for kind, content in blocks(file):
            self._take(kind, content)
            self.progress()
        self._finish()
        return self.restored

    def catch_up(self, file: BinaryIO, now: Moment) -> Restored:
        """Take in what has changed since (Freezing.changes). Raises SnapshotError before it has changed anything."""
        self.catching_up = True
        return self.read(file, now)

    def remain_behind(self) -> None:
        """Go on without what has changed: packets have passed that nobody can tell of."""
        for ct in self.fw.net.table.connections():
            if isinstance(ct, TcpConn):
                forget_windows(ct)

    def _take(self, kind: int, content: bytes) -> None:
        """Take in a block. Kinds that are not known are left alone."""
        if kind == NAMES:
            room = 0xFFFF - len(self.names)
            self.names += _decoded(content, list[str], [])[:room]
        elif kind == ENDED:
            for fields in ENDING.iter_unpack(content[: len(content) // ENDING.size * ENDING.size]):
                self._end(*fields)
        elif kind == CONNS:
            self._each_row(content, self._conn)
        elif kind == EXPECTS:
            self._enter_evictable()
            self._each_row(content, self._expectation)
        elif kind == ENTRIES:
            for fields in ENTRY.iter_unpack(content[: len(content) // ENTRY.size * ENTRY.size]):
                self._address(*fields)
        elif kind == REVOKED:
            for fields in REVOCATION.iter_unpack(content[: len(content) // REVOCATION.size * REVOCATION.size]):
                self._revocation(*fields)
        elif kind == RULES:
            for rule in _decoded(content, list[RuleTotals], []):
                self._rule(rule)
        elif kind == TOTALS:
            self._enter_evictable()
            self._totals(_decoded(content, Totals, None))

    def _each_row(self, content: bytes, place: Callable[[bytes, int, int], None]) -> None:
        at = 0
        while (end := row_end(content, at)) > 0:
            place(content, at, end)
            at = end

    # --- Connections ----------------------------------------------------------------------------------------------

    def _conn(self, block: bytes, at: int, end: int) -> None:
        row = read_conn(block, at, end, self.restored.shift_ms)
        if row is None or not self._complete(row):
            self.restored.refused += 1
            return
        ct, table = row.ct, self.fw.net.table
        if self.catching_up:
            self._remove(ct.orig, ct.zone, ct.id)
        if not self.restored.exact and isinstance(ct, TcpConn):
            if not ct.status & IPS_ASSURED:
                self.restored.stale += 1
                return
            forget_windows(ct)
        ct.seen_ms = min(ct.seen_ms, self.now_ms)
        if not ct.status & IPS_CONFIRMED:
            table.hold_unconfirmed(ct, self.now_ms)
            if row.master_id:
                self.announced.append((ct, row.master_id))
        elif ct.expires_ms <= self.now_ms:
            self.restored.expired += 1
            account = self._account_of(ct.rule)
            account.packets += ct.packets_orig + ct.packets_reply
            account.bytes += ct.bytes_orig + ct.bytes_reply
        elif ct.status & IPS_ASSURED and not ct.ending:
            self._enter(row)
        else:
            self.evictable.append(row)
            if len(self.evictable) >= 2 * self.limit:
                self._keep_newest(self.limit)

    def _end(self, number: int, zone: int, length: int, key: bytes) -> None:
        if self._remove(key[:length], zone, number):
            self.ended += 1

    def _remove(self, key: bytes, zone: int, number: int) -> bool:
        """Take a connection out of which we know better now; whether it was there."""
        table = self.fw.net.table
        ct = table.get(key, zone)
        if ct is None or ct.id != number:
            return False
        account = ct.account
        if account is not None:
            account.let_go(ct)  # what it has carried is told by the counters that follow
        table.kill(ct, self.now_ms)
        return True

    def _complete(self, row: ConnRow) -> bool:
        """Look up what a row names; False if the helper can't be that of this connection."""
        ct = row.ct
        ct.rule = self._name(row.rule)
        ct.iif = self._interface(row.iif)
        ct.oif = self._interface(row.oif)
        rule = self.fw.ruleset.by_name.get(ct.rule)
        if rule is not None and rule.timeouts is not None:
            ct.timeouts = rule.timeouts_number
        if not row.helper:
            return not row.help
        helper = HELPERS.get(self._name(row.helper))
        if helper is None:
            ct.status &= ~IPS_HELPER  # it was known to who wrote this; the connection goes on without
            return True
        if ct.protonum not in helper.protocols or not (helper.ipv6 or len(ct.orig) == 13):
            return False
        ct.help = helper.new_help()
        return ct.help.thaw(row.help)

    def _enter(self, row: ConnRow) -> None:
        """Enter a connection, if the limits allow it."""
        ct, table = row.ct, self.fw.net.table
        taken = table.get(ct.orig, ct.zone) is not None or table.get(ct.reply, ct.zone) is not None
        if taken or table.count >= self.limit or table.refusal(ct.orig, ct.zone, self.now_ms):
            self.restored.refused += 1
            return
        table.enter(ct, self.now_ms)
        self.restored.flows += 1
        self._account_of(ct.rule).enter(ct)
        if row.labels:
            table.labels[ct.id] = row.labels
        table.last_id = max(table.last_id, ct.id)
        if row.master_id:
            self.announced.append((ct, row.master_id))
        if ct.help is not None:
            self.masters[ct.id] = ct
            ct.help.helper.restored(table, ct)

    def _enter_evictable(self) -> None:
        """Enter what waits for its turn, as far as there is room; those seen last are kept."""
        self._keep_newest(max(0, self.limit - self.fw.net.table.count))
        for row in self.evictable:
            self._enter(row)
        self.evictable = []

    def _keep_newest(self, count: int) -> None:
        self.evictable.sort(key=lambda row: row.ct.seen_ms)
        too_many = len(self.evictable) - count
        if too_many > 0:
            self.restored.refused += too_many
            del self.evictable[:too_many]

    def _account_of(self, name: str) -> Account:
        rule = self.fw.ruleset.by_name.get(name)
        return rule.account if rule is not None else self.accounts.setdefault(name, Account())

    def _name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else ""

    def _interface(self, number: int) -> int:
        index = self.interfaces.get(number)
        if index is None:
            index = self.interfaces[number] = self.links.index(self._name(number))
        return index

    # --- What belongs to them -------------------------------------------------------------------------------------

    def _expectation(self, block: bytes, at: int, end: int) -> None:
        net = self.fw.net
        expect = read_expect(block, at, end, self.restored.shift_ms, self.masters, self.names)
        if expect is None or expect.expires_ms <= self.now_ms:
            return
        expires_ms = expect.expires_ms
        if net.table.expectations.insert(expect, False, net.sysctl.expect_max, self.now_ms) == EXPECT_OK:
            expect.expires_ms = expires_ms
            self.restored.expectations += 1

    def _address(self, number: int, ipv6: int, length: int, packed: bytes, ends_ms: int) -> None:
        entry = self.fw.ruleset.sets.get(self._name(number))
        bits = 128 if ipv6 else 32
        address = int.from_bytes(packed, "big")
        if entry is None or length > bits or address >> bits or address & ((1 << bits - length) - 1):
            return
        if ends_ms != FOR_EVER:
            ends_ms += self.restored.shift_ms
        if ends_ms > self.now_ms and entry.add(ipv6 != 0, address, length, ends_ms, self.now_ms):
            self.restored.addresses += 1

    def _revocation(self, length: int, key: bytes, until_ms: int) -> None:
        until_ms = min(until_ms + self.restored.shift_ms, self.now_ms + REVOKED_MS)
        if length <= len(key) and until_ms > self.now_ms and len(self.fw.revoked) < REVOKED_MAX:
            self.fw.revoked[key[:length]] = until_ms

    # --- Counters -------------------------------------------------------------------------------------------------

    def _rule(self, totals: RuleTotals) -> None:
        rule = self.fw.ruleset.by_name.get(totals.name)
        if rule is None:
            return
        rule.hits += totals.hits
        rule.hit_bytes += totals.hit_bytes
        rule.flows += totals.flows
        rule.account.packets += totals.packets
        rule.account.bytes += totals.bytes
        if totals.last_hit_ms >= 0:
            rule.last_hit_ms = totals.last_hit_ms + self.restored.shift_ms

    def _totals(self, totals: Totals | None) -> None:
        if totals is None:
            return
        table, stats = self.fw.net.table, self.fw.net.stats
        table.last_id = max(table.last_id, min(totals.last_id, COUNT_MAX))
        for name, value in totals.stats.items():
            own = getattr(stats, name, None)
            if isinstance(own, list) and isinstance(value, list):
                own[: len(value)] = value[: len(own)]
            elif isinstance(own, int) and isinstance(value, int):
                setattr(stats, name, value)
        for reason, count in list(totals.drops.items())[:DROP_REASONS_MAX]:
            self.fw.drop_counts[reason] = count

    def _finish(self) -> None:
        """Tie connections to those that announced them, which were confirmed before them; make the counters add up."""
        self._enter_evictable()
        for ct, master_id in self.announced:
            if not ct.id or master_id < ct.id:
                ct.master = self.masters.get(master_id)
        # What is not there any more has ended.
        stats, count = self.fw.net.stats, self.fw.net.table.count
        ended = max(0, stats.insert - stats.destroyed - count)
        stats.destroyed += ended
        stats.closed[CLOSED_TIMEOUT] += ended
        stats.insert = stats.destroyed + count


def _decoded(content: bytes, kind: Any, otherwise: Any) -> Any:
    """Read JSON of a kind; what is none was written by somebody who does not know the checksum's meaning."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return otherwise
