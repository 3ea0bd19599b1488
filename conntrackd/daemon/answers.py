"""What the daemon says about itself, and what helpers expect (api.py)."""

from collections.abc import Iterator

import msgspec

from conntrackd import api
from conntrackd.const import CLOSED_NAMES, CTINFO_NAMES
from conntrackd.daemon import flowrows
from conntrackd.daemon.control import Asked
from conntrackd.daemon.faults import Faults
from conntrackd.daemon.links import Links
from conntrackd.daemon.queue import Queue
from conntrackd.daemon.statusanswers import queue_statuses
from conntrackd.hooks import Firewall
from conntrackd.policy.ruleset import ACTION_NAMES


class Answers:
    """What can be asked besides connections and the policy. `now_ms` is set by the loop whenever it wakes."""

    def __init__(self, fw: Firewall, links: Links, queues: tuple[Queue, Queue], faults: Faults, now_ms: int) -> None:
        self.now_ms = now_ms
        self._fw = fw
        self._links = links
        self._queues = queues
        self._faults = faults

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        """Begin to answer a command; None if it is none of these."""
        command = asked.command
        if command == "expectations":
            return self.expectations()
        if command == "stats":
            return iter([self.stats()])
        return None

    def expectations(self) -> Iterator[api.Expectation]:
        """List what helpers expect."""
        for expect in list(self._fw.net.table.expectations.by_id.values()):
            if expect.expires_ms > self.now_ms:
                yield flowrows.expectation(expect, self.now_ms)

    def stats(self) -> api.Stats:
        """Give all counters."""
        stats = self._fw.net.stats
        return api.Stats(
            found=stats.found,
            invalid=stats.invalid(),
            insert=stats.insert,
            insert_failed=stats.insert_failed,
            drop=stats.drop,
            early_drop=stats.early_drop,
            error=stats.error(),
            search_restart=stats.search_restart,
            clash_resolve=stats.clash_resolve,
            chaintoolong=stats.chaintoolong,
            expect_new=stats.expect_new,
            expect_create=stats.expect_create,
            expect_delete=stats.expect_delete,
            created=stats.created,
            destroyed=stats.destroyed,
            unconfirmed_expired=stats.unconfirmed_expired,
            unconfirmed_full=stats.unconfirmed_full,
            expired_when_full=stats.expired_when_full,
            emergency_drop=stats.emergency_drop,
            adaptive_drop=stats.adaptive_drop,
            table_full=stats.table_full,
            source_full=stats.source_full,
            zone_full=stats.zone_full,
            closed=dict(zip(CLOSED_NAMES, stats.closed, strict=True)),
            listeners=self._fw.net.events.listeners,
            events=self._fw.net.events.seq,
            events_lost=self._fw.net.events.lost,
            ctinfo={name: stats.ctinfo[ctinfo] for ctinfo, name in CTINFO_NAMES.items()},
            drops=dict(self._fw.drop_counts),
            faults=self._faults.counts(),
            rules=[api.RuleHits(rule.name, ACTION_NAMES[rule.action], rule.hits) for rule in self._fw.ruleset.rules],
            queues=queue_statuses(self._queues),
        )
