"""What goes wrong around the packets: counters that should stand still, for `status`, `stats` and the log.

One that has risen is a problem until it has stood still for RECENT_MS; the log is told when it begins and when it is
over. They are looked at about once a second, so nothing of this is on the packet path.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import structlog

from conntrackd import api
from conntrackd.daemon.health import ERROR, RECENT_MS, WARNING
from conntrackd.hooks import Firewall

HELD_UP_MS: Final = 2000  # the loop turns at least once a second: when it comes so late, it stood still

log = structlog.get_logger()


class Counter(NamedTuple):
    """A counter that should stand still, and what it means that it has risen: {count} says by how much."""

    severity: str
    message: str


COUNTERS: Final = {
    "queue_bypassed": Counter(
        ERROR,
        "{count} packets reached the second hook unseen by the first: a queue is full and [exception] queue_overflow "
        "lets packets pass, or another tool overwrites our bits of the packet mark.",
    ),
    "out_of_memory": Counter(
        ERROR, "There was no memory, {count} times: until the next reload the table does not grow."
    ),
    "saturated": Counter(
        WARNING, "The processor does not keep up: for {count} seconds there was no moment without waiting packets."
    ),
    "held_up": Counter(
        WARNING,
        "The packet loop stood still for more than a second, {count} times: "
        "the processor is taken by others, or the machine was paused.",
    ),
    "suspended": Counter(WARNING, "The machine slept, {count} times: see [exception] suspend for what has expired."),
    "clock_set": Counter(WARNING, "The wall clock was set {count} times; nothing but the times in answers goes by it."),
    "interface_gone": Counter(
        WARNING,
        "{count} interfaces of zones went, or lost their names: their rules rest until they are back. "
        "Which, says links_changed in the log.",
    ),
    "reject_unanswered": Counter(
        WARNING,
        "{count} answers of `reject` could not be sent: see reject_cannot_answer in the log. The packets were dropped.",
    ),
    "log_lost": Counter(
        WARNING, "{count} lines of the log were lost: whatever reads it does not keep up, or its disk is full."
    ),
    "clients_closed": Counter(
        WARNING, "{count} clients of the control socket neither spoke nor listened, and were closed."
    ),
    "clients_refused": Counter(WARNING, "{count} clients were refused: there were too many on the control socket."),
    "requests_failed": Counter(
        WARNING, "The daemon itself failed on {count} requests of its control socket: see its log."
    ),
    "rules_changed": Counter(
        WARNING, "Another program changed the iptables rules that bring packets here, {count} times: see the log."
    ),
    "rules_repaired": Counter(WARNING, "The iptables rules were put back {count} times: see [rules] watch."),
    "rules_watch_failed": Counter(
        WARNING, "The iptables rules could not be looked at, or not be put back, {count} times: see the log."
    ),
}  # fmt: skip


class _Episode:
    """One counter over time."""

    def __init__(self) -> None:
        self.total = 0
        self.before = 0  # when it began to rise
        self.rose_ms = 0
        self.lasts = False


class Faults:
    """The counters, and what of them is a problem now."""

    def __init__(self, fw: Firewall) -> None:
        self.out_of_memory = 0
        self._saturated_ms = 0
        self._held_up = 0
        self._ticked_ms = 0
        self._counters: dict[str, Callable[[], int]] = {
            "queue_bypassed": lambda: fw.unseen,
            "out_of_memory": lambda: self.out_of_memory,
            "saturated": lambda: self._saturated_ms // 1000,
            "held_up": lambda: self._held_up,
        }
        self._episodes = {name: _Episode() for name in COUNTERS}

    def watch(self, name: str, counter: Callable[[], int]) -> None:
        """Look at one more of COUNTERS from now on."""
        assert name in COUNTERS
        self._counters[name] = counter

    def tick(self, now_ms: int, rested: bool, slept: bool) -> None:
        """Look at all counters: whether the queues were ever empty since the last time, and the machine slept."""
        since_ms = now_ms - self._ticked_ms if self._ticked_ms and not slept else 0
        self._ticked_ms = now_ms
        self._saturated_ms += 0 if rested else since_ms
        self._held_up += since_ms > HELD_UP_MS
        for name, counter in self._counters.items():
            self._look(name, counter(), now_ms)

    def _look(self, name: str, total: int, now_ms: int) -> None:
        episode = self._episodes[name]
        if total != episode.total:
            if not episode.lasts:
                episode.lasts = True
                episode.before = episode.total
                log.warning("problem", name=name, message=_message(name, total - episode.before))
            episode.total = total
            episode.rose_ms = now_ms
        elif episode.lasts and now_ms - episode.rose_ms >= RECENT_MS:
            episode.lasts = False
            log.info("problem_over", name=name, count=total - episode.before)

    def problems(self) -> Iterator[api.Problem]:
        """Name what is a problem now."""
        for name, episode in self._episodes.items():
            if episode.lasts:
                message = _message(name, episode.total - episode.before)
                yield api.Problem(name=name, severity=COUNTERS[name].severity, message=message)

    def counts(self) -> dict[str, int]:
        """Give all counters as they were last looked at."""
        return {name: episode.total for name, episode in self._episodes.items()}


def _message(name: str, count: int) -> str:
    message = COUNTERS[name].message
    return (message.replace("{count} times", "once") if count == 1 else message).format(count=count)
