"""What is wrong with the daemon now, in named problems: `status` shows them, metrics count them.

A part that can tell that something is wrong adds a function to `Health.sources`. It is asked whenever somebody wants to
know, gives nothing while all is well, and must not take long. A problem's name is for scripts and stays as it is; its
message is for people and says what to do.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from conntrackd import api
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.queue import Queue, kernel_queues
from conntrackd.hooks import Firewall

NEAR_PERCENT: Final = 80  # of a limit: a warning
FULL_PERCENT: Final = 95  # an error
RECENT_MS: Final = 60_000  # for so long what was lost counts as a problem

OK: Final = "ok"
DEGRADED: Final = "degraded"
FAILING: Final = "failing"
WARNING: Final = "warning"
ERROR: Final = "error"

# What is counted -> the problem that it is, and its sentence.
LOSSES: Final = {
    "queue_drops": "The kernel dropped {count} packets because queue {queue} was full or its buffer short: "
    "more comes than the daemon can judge, or queue.max_length and queue.socket_buffer are too small.",
    "internal_errors": "The daemon failed on {count} packets of queue {queue}: see its log, and report it.",
    "verdicts_refused": "The kernel refused {count} messages with verdicts for queue {queue}: see the log.",
    "table_refused": "{count} new connections were refused because the table was full: raise conntrack.max, "
    "or find who opens so many with `conntrackd flows`.",
}
FILLING: Final = {
    "table": "raise conntrack.max, or find who opens so many with `conntrackd flows`",
    "unconfirmed": "first packets do not leave: raise conntrack.unconfirmed_max, or see what drops them in FORWARD",
    "expectations": "raise conntrack.expect_max, or see `conntrackd flows --expected`",
    "queue": "packets come faster than they are judged: raise queue.max_length, or give the daemon more CPU",
    "buffer": "packets come faster than they are read: raise queue.socket_buffer, or give the daemon more CPU",
}


class Health:
    """The list of problems, how full everything is that has a limit, and the rate of packets."""

    def __init__(self, fw: Firewall, queues: Sequence[Queue], generations: Generations, now_ms: int) -> None:
        self.sources: list[Callable[[], Iterable[api.Problem]]] = [self._filling, self._losses, self._policy]
        self.packets_per_second = 0
        self._fw = fw
        self._queues = queues
        self._generations = generations
        self._now_ms = now_ms
        self._packets = 0
        # By problem and queue (-1: none): the count, how many of it are recent, and when it last grew.
        self._lost: dict[tuple[str, int], tuple[int, int, int]] = {}

    def tick(self, now_ms: int) -> None:
        """Look at what has happened since the last time; to be called about once a second."""
        packets = sum(queue.packets for queue in self._queues)
        self.packets_per_second = (packets - self._packets) * 1000 // max(1, now_ms - self._now_ms)
        self._packets, self._now_ms = packets, now_ms
        kernel = kernel_queues()
        for queue in self._queues:
            if queue.number in kernel:
                known = kernel[queue.number]
                self._count("queue_drops", queue.number, known.dropped_full + known.dropped_socket)
            self._count("internal_errors", queue.number, queue.errors)
            self._count("verdicts_refused", queue.number, queue.verdict_errors)
        self._count("table_refused", -1, self._fw.net.stats.table_full)

    def _count(self, name: str, queue: int, count: int) -> None:
        before, recent, grown_ms = self._lost.get((name, queue), (0, 0, 0))
        if count > before:
            recent, grown_ms = recent + count - before, self._now_ms
        elif self._now_ms - grown_ms >= RECENT_MS:
            recent = 0
        self._lost[name, queue] = (count, recent, grown_ms)

    def problems(self) -> list[api.Problem]:
        """List what is wrong now, the worst first."""
        found = [problem for source in self.sources for problem in source()]
        return sorted(found, key=lambda problem: problem.severity != ERROR)

    def limits(self) -> list[api.Limit]:
        """Say of everything that has a limit how much of it is used."""
        net = self._fw.net
        limits = [
            _limit("table", net.table.count, net.sysctl.max),
            _limit("unconfirmed", net.table.unconfirmed_count(), net.sysctl.unconfirmed_max),
            _limit("expectations", len(net.table.expectations.by_id), net.sysctl.expect_max),
        ]
        kernel = kernel_queues()
        for queue in self._queues:
            waiting = kernel[queue.number].waiting if queue.number in kernel else 0
            limits.append(_limit(f"queue {queue.number}", waiting, queue.max_length))
            limits.append(_limit(f"buffer {queue.number}", *queue.socket_memory()))
        return limits

    def _filling(self) -> Iterator[api.Problem]:
        for limit in self.limits():
            percent = limit.percent or 0
            if percent >= NEAR_PERCENT:
                kind = limit.name.partition(" ")[0]
                yield api.Problem(
                    name=f"{kind}_filling",
                    severity=ERROR if percent >= FULL_PERCENT else WARNING,
                    message=f"{limit.name} is {percent} % full ({limit.used} of {limit.max}): {FILLING[kind]}.",
                )

    def _losses(self) -> Iterator[api.Problem]:
        for (name, queue), (_, recent, _) in self._lost.items():
            if recent:
                yield api.Problem(name=name, severity=ERROR, message=LOSSES[name].format(count=recent, queue=queue))
        for each in self._queues:
            granted, wanted = each.socket_memory()[1] // 2, each.wanted_buffer  # the kernel counts twice
            if 0 < granted < wanted:
                yield api.Problem(
                    name="buffer_short",
                    severity=WARNING,
                    message=f"The kernel grants queue {each.number} a buffer of {granted} bytes, not {wanted}: "
                    f"run the daemon with CAP_NET_ADMIN, or `sysctl -w net.core.rmem_max={wanted}`.",
                )

    def _policy(self) -> Iterator[api.Problem]:
        generations = self._generations
        if generations.failed_at:
            yield api.Problem(
                name="reload_failed",
                severity=WARNING,
                message=f"{generations.failed_file} was refused at {api.timestamp(generations.failed_at)[:19]} UTC, "
                f"and generation {generations.number} is still in force: see "
                f"`conntrackd check {generations.failed_file}`. A `reload` or `apply` that succeeds ends this.",
            )


def word(problems: Iterable[api.Problem]) -> str:
    """Sum problems up in one word."""
    severities = {problem.severity for problem in problems}
    if ERROR in severities:
        return FAILING
    return DEGRADED if severities else OK


def _limit(name: str, used: int, limit: int) -> api.Limit:
    return api.Limit(name=name, used=used, max=limit, percent=used * 100 // limit if limit else None)
