"""What Prometheus is told, as metric families (docs/metrics.md lists them). Imported only when [metrics] is on.

The families are made anew for each text, from counters that are there anyway; nothing is counted on the packet path for
them. What needs a walk (connections by state, what those of a rule have carried, 10,000 rules) is done in slices:
between two of them packets have their turn.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from typing import Any, Final

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from conntrackd.const import (
    CLOSED_NAMES,
    CTINFO_NAMES,
    INVALID,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPS_ASSURED,
    IPS_SEEN_REPLY,
    STRESSED,
    STRESSED_TABLE_FULL,
)
from conntrackd.core import compiled
from conntrackd.core.conn import Conn
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATE_NAMES
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATE_NAMES
from conntrackd.core.tuples import PROTOCOL_NAMES
from conntrackd.daemon.answerer import Answerer
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.health import Health
from conntrackd.daemon.queue import LATENCY_BOUNDS_US, Queue, kernel_queues
from conntrackd.hooks import DROP_REASONS, Firewall
from conntrackd.policy.ruleset import ACCEPT, ACTION_NAMES

PREFIX: Final = "conntrackd_"
SAMPLES_PER_SLICE: Final = 64  # a line of text takes about five microseconds
CONNECTIONS_PER_SLICE: Final = 256
HOOKS: Final = ("prerouting+output", "postrouting+input")
# In place of a state, for protocols that have none.
UNREPLIED, REPLIED, ASSURED = 253, 254, 255
STATUS_STATES: Final = {UNREPLIED: "UNREPLIED", REPLIED: "REPLIED", ASSURED: "ASSURED"}
LABELS: Final = ("rule", "action")

Sample = tuple[Sequence[str], float]  # values of the labels, value


class Metrics:
    """The families, and their text."""

    def __init__(
        self,
        version: str,
        fw: Firewall,
        queues: Sequence[Queue],
        generations: Generations,
        health: Health,
        answerer: Answerer,
    ) -> None:
        self._version = version
        self._fw = fw
        self._queues = queues
        self._generations = generations
        self._health = health
        self._answerer = answerer
        self._process = ProcessCollector(registry=None)
        # Packets and bytes that were last told of each rule: a counter never goes back, and what connections carried is
        # missing from a sum now and then, when they end or change to another rule while the sum is made.
        self._told: dict[str, tuple[int, int]] = {}

    def text(self) -> Iterator[bytes]:
        """Write everything, in pieces of a slice each; where only a part of a walk was done the piece is empty."""
        before = ""
        for family in chain(self._families(), self._process.collect()):
            if family is None:
                yield b""
                continue
            piece = generate_latest(_One(family))
            # Of a family in several parts, HELP and TYPE stand in front of the first.
            yield piece.split(b"\n", 2)[2] if family.name == before else piece
            before = family.name

    def _families(self) -> Iterator[Metric | None]:
        yield from self._daemon()
        yield from self._table()
        yield from self._packets()
        yield from self._kernel()
        yield from self._walked()

    # --- The daemon and its policy --------------------------------------------------------------------------------

    def _daemon(self) -> Iterator[Metric]:
        core = "compiled" if compiled() else "pure"
        build = {"version": self._version, "core": core, "python": platform.python_version()}
        yield InfoMetricFamily(PREFIX + "build", "What runs.", build)
        problems = [((problem.name, problem.severity), 1) for problem in self._health.problems()]
        yield _gauge("problem", "What `conntrackd status` says is wrong now.", ("name", "severity"), dict(problems))
        generations = self._generations
        last = generations.history[-1]
        yield _gauge("config_generation", "Generation of the policy in force.", (), generations.number)
        yield _gauge(
            "config_last_reload_successful", "Whether the last change of the policy was taken.", (),
            not generations.failed_at,
        )  # fmt: skip
        yield _gauge(
            "config_last_reload_timestamp_seconds", "When a policy was last put in force, or refused.", (),
            max(last.at, generations.failed_at),
        )  # fmt: skip
        on_trial = generations.trial_seconds() is not None
        yield _gauge("config_on_trial", "Whether the policy in force goes back unless it is confirmed.", (), on_trial)

    # --- The table ------------------------------------------------------------------------------------------------

    def _table(self) -> Iterator[Metric]:
        net = self._fw.net
        table, stats, sysctl = net.table, net.stats, net.sysctl
        yield _gauge("flows_limit", "Connections that the table may hold; 0: any number.", (), sysctl.max)
        full = table.count / sysctl.max if sysctl.max else 0
        yield _gauge("table_fill_ratio", "How full the table is, 0 to 1; 0 without a limit.", (), full)
        yield _counter("flows_created", "Connections confirmed: their first packet left.", (), stats.insert)
        closed = {(name,): count for name, count in zip(CLOSED_NAMES, stats.closed, strict=True)}
        yield _counter("flows_closed", "Confirmed connections that ended.", ("reason",), closed)
        refused = {("table",): stats.table_full, ("source",): stats.source_full, ("zone",): stats.zone_full}
        yield _counter("flows_refused", "New connections refused at a limit.", ("limit",), refused)
        made_room = {
            ("expired",): stats.expired_when_full,
            ("not_assured",): stats.early_drop,
            ("closing",): stats.emergency_drop,
            ("adaptive",): stats.adaptive_drop,
        }
        yield _counter("flows_evicted", "Connections that made room in a full table.", ("kind",), made_room)
        yield _counter("insert_failed", "Connections whose tuple was taken at confirm.", (), stats.insert_failed)
        yield _counter("clash_resolve", "Packets that joined the connection of their twin.", (), stats.clash_resolve)
        yield _gauge("unconfirmed", "Connections whose first packet has not left yet.", (), table.unconfirmed_count())
        yield _gauge("unconfirmed_limit", "As many of these as there may be.", (), sysctl.unconfirmed_max)
        yield _counter(
            "unconfirmed_expired", "Connections whose first packet never left.", (), stats.unconfirmed_expired
        )
        yield _gauge("expectations_limit", "Expectations that there may be; 0: any number.", (), sysctl.expect_max)
        yield _counter("expectations_created", "Expectations that helpers made.", (), stats.expect_create)
        yield _counter("events_lost", "Events that a listener was too slow for.", (), net.events.lost)

    # --- Packets --------------------------------------------------------------------------------------------------

    def _packets(self) -> Iterator[Metric]:
        fw = self._fw
        verdicts: dict[Sequence[str], float] = {}
        for hook, queue in zip(HOOKS, self._queues, strict=True):
            verdicts[hook, "accept"] = queue.packets - queue.dropped
            verdicts[hook, "drop"] = queue.dropped
        yield _counter("packets", "Packets by the verdict they got.", ("hook", "verdict"), verdicts)
        drops = dict.fromkeys(DROP_REASONS, 0) | fw.drop_counts
        yield _counter("drops", "Packets dropped.", ("reason",), {(name,): count for name, count in drops.items()})
        ctinfo = fw.net.stats.ctinfo
        invalid = {(name,): ctinfo[at] for at, name in CTINFO_NAMES.items() if INVALID <= at < STRESSED}
        yield _counter("invalid_packets", "INVALID packets, dropped or not.", ("reason",), invalid)
        tracked = {(name,): ctinfo[at] for at, name in CTINFO_NAMES.items() if at < INVALID}
        yield _counter("tracked_packets", "Packets by what they are to their connection.", ("ctinfo",), tracked)
        dropped, refused = fw.drop_counts.get(CTINFO_NAMES[STRESSED_TABLE_FULL], 0), fw.net.stats.table_full
        kernel = kernel_queues()
        lost = [kernel[queue.number] for queue in self._queues if queue.number in kernel]
        applied = {
            ("table_full", "drop"): dropped,
            ("table_full", "accept"): max(0, refused - dropped),
            ("internal_error", "drop"): sum(queue.errors - queue.errors_accepted for queue in self._queues),
            ("internal_error", "accept"): sum(queue.errors_accepted for queue in self._queues),
            ("queue_overflow", "drop"): sum(queue.dropped_full + queue.dropped_socket for queue in lost),
        }
        yield _counter(
            "exception_policy_applied", "Packets that [exception] decided about.", ("cause", "action"), applied
        )
        answers = {
            ("sent",): self._answerer.sent,
            ("failed",): self._answerer.failed,
            ("suppressed",): fw.answers_suppressed,
        }
        yield _counter("reject_answers", "Answers of rules that reject.", ("result",), answers)

    def _kernel(self) -> Iterator[Metric]:
        """Give what there is to say of each queue, from both sides."""
        durations = HistogramMetricFamily(
            PREFIX + "verdict_duration_seconds", "Time from the wake-up to a packet's verdict.", labels=["queue"]
        )
        depths, limits, dropped, refused, used, sizes = ({} for _ in range(6))
        kernel = kernel_queues()
        bounds = (*(str(bound / 1e6) for bound in LATENCY_BOUNDS_US), "+Inf")
        for queue in self._queues:
            number = str(queue.number)
            buckets = list(zip(bounds, accumulate(queue.latency), strict=True))
            durations.add_metric([number], buckets, queue.latency_sum_us / 1e6)
            limits[number,] = queue.max_length
            refused[number,] = queue.verdict_errors
            used[number,], sizes[number,] = queue.socket_memory()
            known = kernel.get(queue.number)
            if known is not None:
                depths[number,] = known.waiting
                dropped[number, "kernel"], dropped[number, "user"] = known.dropped_full, known.dropped_socket
        yield durations
        yield _gauge("queue_depth", "Packets that wait for their verdict.", ("queue",), depths)
        yield _gauge("queue_limit", "Packets that may wait.", ("queue",), limits)
        yield _counter(
            "queue_dropped", "Packets that never came to us: the queue (kernel) or our socket (user) was full.",
            ("queue", "where"), dropped,
        )  # fmt: skip
        yield _counter("verdicts_refused", "Messages with verdicts that the kernel did not take.", ("queue",), refused)
        yield _gauge("queue_buffer_used_bytes", "What our socket's buffer holds.", ("queue",), used)
        yield _gauge("queue_buffer_bytes", "What our socket's buffer may hold.", ("queue",), sizes)

    # --- What needs a walk ----------------------------------------------------------------------------------------

    def _walked(self) -> Iterator[Metric | None]:
        expected: dict[Sequence[str], float] = {}
        for number, expect in enumerate(list(self._fw.net.table.expectations.by_id.values())):
            info = expect.master.help
            helper = info.helper.name if info is not None else ""
            expected[helper,] = expected.get((helper,), 0) + 1
            if number % CONNECTIONS_PER_SLICE == CONNECTIONS_PER_SLICE - 1:
                yield None
        yield _gauge("expectations", "Connections that helpers expect.", ("helper",), expected)

        # Rules first: what a connection carried that ends meanwhile is missing this time, and never counted twice.
        ruleset = self._fw.ruleset
        packets: dict[str, int] = {}
        octets: dict[str, int] = {}
        for number, rule in enumerate(ruleset.rules):
            admits = rule.action == ACCEPT and (rule.flows > 0 or rule.account.live > 0)
            packets[rule.name] = rule.account.packets if admits else rule.hits
            octets[rule.name] = rule.account.bytes if admits else rule.hit_bytes
            if number % CONNECTIONS_PER_SLICE == CONNECTIONS_PER_SLICE - 1:
                yield None
        states: dict[int, int] = {}
        for number, ct in enumerate(self._fw.net.table.connections()):
            state = ct.protonum << 8 | _state(ct)
            states[state] = states.get(state, 0) + 1
            if ct.account is not None and ct.rule in packets:
                packets[ct.rule] += ct.packets_orig + ct.packets_reply
                octets[ct.rule] += ct.bytes_orig + ct.bytes_reply
            if number % CONNECTIONS_PER_SLICE == CONNECTIONS_PER_SLICE - 1:
                yield None
        flows: dict[Sequence[str], float] = {}
        for state, count in states.items():
            names = _names(state)
            flows[names] = flows.get(names, 0) + count
        yield _gauge("flows", "Connections in the table.", ("protocol", "state"), flows)

        told = self._told
        self._told = {}
        rows: list[tuple[tuple[str, str], int, int, int]] = []
        for number, rule in enumerate(ruleset.rules):
            before = told.get(rule.name, (0, 0))
            carried = max(packets[rule.name], before[0]), max(octets[rule.name], before[1])
            self._told[rule.name] = carried
            rows.append(((rule.name, ACTION_NAMES[rule.action]), *carried, rule.account.live))
            if number % CONNECTIONS_PER_SLICE == CONNECTIONS_PER_SLICE - 1:
                yield None
        yield from _parts(
            CounterMetricFamily(
                PREFIX + "rule_packets", "Packets that a rule decided, or of its flows.", labels=LABELS
            ),
            ((row[0], row[1]) for row in rows),
        )
        yield from _parts(
            CounterMetricFamily(PREFIX + "rule_bytes", "Bytes of these, from the IP header on.", labels=LABELS),
            ((row[0], row[2]) for row in rows),
        )
        yield from _parts(
            GaugeMetricFamily(PREFIX + "rule_flows", "Connections in the table that a rule admitted.", labels=LABELS),
            ((row[0], row[3]) for row in rows),
        )


class _One(Collector):
    """A collector of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        """Give it."""
        return (self._family,)


def _gauge(name: str, text: str, labels: Sequence[str], values: Mapping[Any, float] | float) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    return _filled(family, values)


def _counter(name: str, text: str, labels: Sequence[str], values: Mapping[Any, float] | float) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    return _filled(family, values)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[Any, float] | float
) -> GaugeMetricFamily | CounterMetricFamily:
    for names, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        family.add_metric(names, value)
    return family


def _parts(family: GaugeMetricFamily | CounterMetricFamily, samples: Iterator[Sample]) -> Iterator[Metric]:
    """Give a family in parts of a slice each."""
    while part := list(islice(samples, SAMPLES_PER_SLICE)):
        family.samples.clear()
        yield _filled(family, dict(part))


def _state(ct: Conn) -> int:
    if ct.protonum == IPPROTO_TCP or ct.protonum == IPPROTO_SCTP:
        return ct.state
    if ct.status & IPS_ASSURED:
        return ASSURED
    return REPLIED if ct.status & IPS_SEEN_REPLY else UNREPLIED


def _names(state: int) -> tuple[str, str]:
    """Name a protocol and a state. Protocols without a name are one: anybody can send all of them."""
    protonum, state = state >> 8, state & 0xFF
    if protonum == IPPROTO_TCP:
        return "tcp", TCP_STATE_NAMES[state]
    if protonum == IPPROTO_SCTP:
        return "sctp", SCTP_STATE_NAMES[state]
    return PROTOCOL_NAMES.get(protonum, "other"), STATUS_STATES[state]
