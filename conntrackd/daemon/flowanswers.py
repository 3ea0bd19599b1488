"""What can be asked about connections: flows, flow, count, events; kill, which ends them, and label."""

from collections.abc import Iterator
from typing import Final

import msgspec
import structlog

from conntrackd import api
from conntrackd.const import CLOSED_KILLED, CLOSED_NAMES, IPCT_DESTROY, IPCT_NAMES, IPS_DYING, LABELS_MAX
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import set_labels
from conntrackd.core.ecache import Event
from conntrackd.core.expect import Expect
from conntrackd.daemon import flowrows
from conntrackd.daemon.control import MORE, QUIET, Asked, arguments
from conntrackd.daemon.links import Links
from conntrackd.filter import FilterError, cost, parse
from conntrackd.hooks import Firewall
from conntrackd.mistakes import nearest
from conntrackd.predicate import Predicate, UnknownLabelError, predicate

LOOKED_AT: Final = 16  # connections or events: asking a short filter of so many takes about as long as making a row

log = structlog.get_logger()


class Chosen:
    """The connections that a filter chooses."""

    def __init__(self, text: str, fw: Firewall, links: Links) -> None:
        try:
            expression = parse(text)
            self.matches: Predicate = predicate(expression, links.interface, fw.net.table.labels, fw.ruleset)
        except FilterError as error:
            raise api.RequestError(str(error)) from None
        except UnknownLabelError as error:
            raise api.RequestError(no_label(str(error), fw)) from None
        self.text = text
        self.at_once = max(1, LOOKED_AT // cost(expression))


def no_label(name: str, fw: Firewall) -> str:
    """Say that there is no such label, and which may be meant."""
    hint = nearest(name, list(fw.ruleset.labels.values()))
    return f"There is no label {name!r}; {hint}" if hint else f"There is no label {name!r}: define it in [labels]."


class FlowAnswers:
    """Everything about connections. `now_ms` is set by the loop whenever it wakes."""

    def __init__(self, fw: Firewall, links: Links) -> None:
        self.now_ms = 0
        self._fw = fw
        self._links = links

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct] | None:
        """Begin to answer a command; None if it is none of these."""
        if asked.command == "flows":
            return self._flows(self._chosen(asked))
        if asked.command == "count":
            return self._count(self._chosen(asked))
        if asked.command == "events":
            wanted = arguments(asked, api.EventsArgs)
            return self._events(Chosen(wanted.filter, self._fw, self._links), wanted.expected)
        if asked.command == "flow":
            return self._details(arguments(asked, api.FlowArgs).id)
        if asked.command == "kill":
            args = arguments(asked, api.KillArgs)
            if not args.filter.strip():
                raise api.RequestError("Which flows are to be killed? The filter `all` is all of them.")
            if not args.dry_run and not asked.may_change():
                raise api.RequestError(f"Killing flows needs root, and you are {asked.who()}.")
            chosen = Chosen(args.filter, self._fw, self._links)
            if args.expected:
                return self._kill_expected(chosen, asked, args.dry_run)
            return self._flows(chosen) if args.dry_run else self._kill(chosen, asked)
        if asked.command == "label":
            return self._label(asked)
        return None

    def _chosen(self, asked: Asked) -> Chosen:
        return Chosen(arguments(asked, api.FilterArgs).filter, self._fw, self._links)

    def _find(self, chosen: Chosen) -> Iterator[Conn | None]:
        """Go through the table: each connection that is there all the time once; None after so much work."""
        matches, left = chosen.matches, chosen.at_once
        for ct in self._fw.net.table.connections():
            if ct.expires_ms > self.now_ms and matches(ct, ct, self.now_ms):
                yield ct
            left -= 1
            if not left:
                left = chosen.at_once
                yield None

    def _flows(self, chosen: Chosen) -> Iterator[msgspec.Struct]:
        """List connections, each as it is when its turn comes."""
        for ct in self._find(chosen):
            yield MORE if ct is None else self._flow(ct)

    def _count(self, chosen: Chosen) -> Iterator[msgspec.Struct]:
        count = 0
        for ct in self._find(chosen):
            if ct is None:
                yield MORE
            else:
                count += 1
        yield api.Count(count)

    def _kill(self, chosen: Chosen, asked: Asked) -> Iterator[msgspec.Struct]:
        """End connections, and only then tell which: how fast the client reads makes no difference."""
        killed: list[tuple[Conn, int]] = []
        labels = self._fw.net.table.labels
        try:
            for ct in self._find(chosen):
                if ct is None:
                    yield MORE
                else:
                    killed.append((ct, labels.get(ct.id, 0)))  # which it loses
                    self._fw.net.table.kill(ct, self.now_ms, CLOSED_KILLED)
        finally:
            log.info("flows_killed", filter=chosen.text, count=len(killed), who=asked.who(), pid=asked.pid)
        for ct, bits in killed:
            yield msgspec.structs.replace(self._flow(ct), labels=flowrows.labels(self._fw, bits))

    def _kill_expected(self, chosen: Chosen, asked: Asked, dry_run: bool) -> Iterator[msgspec.Struct]:
        """End what connections expect, and only then tell what that was."""
        found = []
        left = chosen.at_once
        for expect in list(self._fw.net.table.expectations.by_id.values()):
            if expect.expires_ms > self.now_ms and chosen.matches(expect.master, expect.master, self.now_ms):
                found.append(expect)
            left -= 1
            if not left:
                left = chosen.at_once
                yield MORE
        rows = [flowrows.expectation(expect, self.now_ms) for expect in found]
        if not dry_run:
            for expect in found:
                self._fw.net.table.expectations.unlink(expect, self.now_ms)
            log.info("expectations_killed", filter=chosen.text, count=len(found), who=asked.who(), pid=asked.pid)
        yield from rows

    def _label(self, asked: Asked) -> Iterator[msgspec.Struct]:
        """List the labels, or begin to change those of connections."""
        args = arguments(asked, api.LabelArgs)
        fw = self._fw
        if args.action == "list":
            return iter([api.Label(name, bit) for bit, name in sorted(fw.ruleset.labels.items())])
        if not args.filter.strip():
            raise api.RequestError("Labels of which flows? The filter `all` is all of them.")
        if not asked.may_change():
            raise api.RequestError(f"Changing labels needs root, and you are {asked.who()}.")
        bits = 0
        for name in args.labels:
            bit = fw.ruleset.label_bit(name)
            if bit < 0:
                raise api.RequestError(no_label(name, fw))
            bits |= 1 << bit
        if args.action == "add":
            return self._change_labels(Chosen(args.filter, fw, self._links), asked, bits, 0)
        every = (1 << LABELS_MAX) - 1
        return self._change_labels(Chosen(args.filter, fw, self._links), asked, 0, bits if args.labels else every)

    def _change_labels(self, chosen: Chosen, asked: Asked, add: int, take: int) -> Iterator[msgspec.Struct]:
        """Change labels of connections, and only then tell which of them have others now."""
        changed: list[Conn] = []
        net = self._fw.net
        try:
            for ct in self._find(chosen):
                if ct is None:
                    yield MORE
                    continue
                before = net.table.labels.get(ct.id, 0)
                after = (before | add) & ~take
                if after != before:
                    set_labels(net, ct, after, self.now_ms)
                    changed.append(ct)
        finally:
            args, count, who = asked.args, len(changed), asked.who()
            log.info("labels_changed", action=args["action"], labels=args.get("labels", []), filter=chosen.text,
                     count=count, who=who, pid=asked.pid)  # fmt: skip
        yield from map(self._flow, changed)

    def _details(self, number: int) -> Iterator[msgspec.Struct]:
        """Tell everything about one connection, in one row; none if it is not there."""
        found: Conn | None = None
        children = []
        for ct in self._find(Chosen("", self._fw, self._links)):
            if ct is None:
                yield MORE
            elif ct.id == number:
                found = ct
            elif ct.master is not None and ct.master.id == number:
                children.append(ct.id)
        if found is not None and not found.status & IPS_DYING:
            yield flowrows.details(self._fw, found, children, self.now_ms, self._links.interface)

    def _flow(self, ct: Conn) -> api.Flow:
        return flowrows.flow(self._fw, ct, self.now_ms, self._links.interface)

    # --- Events ---------------------------------------------------------------------------------------------------

    def _events(self, chosen: Chosen, expected: bool) -> Iterator[msgspec.Struct]:
        """Tell what happens from now on to connections, or to what they expect."""
        ring = self._fw.net.events
        listener = ring.listen()
        told = 0
        left = chosen.at_once
        try:
            while True:
                event = ring.read(listener)
                if listener.lost > told:
                    yield api.Lost(count=listener.lost - told)
                    told = listener.lost
                if event is None:
                    yield QUIET
                elif (event.expect is not None) == expected and chosen.matches(event.ct, event, event.now_ms):
                    yield self._event(event) if event.expect is None else self._expectation_event(event, event.expect)
                else:
                    left -= 1
                    if not left:
                        left = chosen.at_once
                        yield MORE
        finally:
            ring.leave()

    def _event(self, event: Event) -> api.Event:
        ct = event.ct
        flow = msgspec.structs.replace(
            self._flow(ct),
            state=flowrows.state_name(ct, event.state),
            status=flowrows.status_names(event.status),
            timeout_seconds=max(0, (event.expires_ms - event.now_ms) // 1000),
            age_seconds=(event.now_ms - ct.created_ms) // 1000,
            mark=event.mark,
            labels=flowrows.labels(self._fw, event.labels),
            idle_seconds=max(0, event.now_ms - ct.seen_ms) // 1000,
        )
        return api.Event(
            type=event.kind(),
            time=flowrows.moment(event.now_ms, self.now_ms),
            changes=[name for bit, name in IPCT_NAMES.items() if event.bits & bit],
            reason=CLOSED_NAMES[event.reason] if event.bits & IPCT_DESTROY else None,
            flow=flow,
        )

    def _expectation_event(self, event: Event, expect: Expect) -> api.ExpectationEvent:
        return api.ExpectationEvent(
            type=event.kind(),
            time=flowrows.moment(event.now_ms, self.now_ms),
            expectation=flowrows.expectation(expect, event.now_ms),
        )
