"""What the daemon says about itself as a whole: `status` of the control socket (api.py)."""

import os
from collections.abc import Iterator, Sequence
from typing import Final

from conntrackd import api
from conntrackd.core import compiled
from conntrackd.daemon.control import Asked
from conntrackd.daemon.generations import Generations
from conntrackd.daemon.health import Health, word
from conntrackd.daemon.links import Links
from conntrackd.daemon.queue import LATENCY_BOUNDS_US, KernelQueue, Queue, kernel_queues
from conntrackd.daemon.state import State
from conntrackd.hooks import Firewall

NOTHING_KNOWN: Final = KernelQueue(portid=0, waiting=0, dropped_full=0, dropped_socket=0)
LATENCY_LABELS: Final = (*(str(bound) for bound in LATENCY_BOUNDS_US), "+Inf")
HOOKS: Final = (["PREROUTING", "OUTPUT"], ["POSTROUTING", "INPUT"])


class StatusAnswers:
    """The state of the daemon. `now_ms` is set by the loop whenever it wakes."""

    def __init__(
        self,
        version: str,
        fw: Firewall,
        links: Links,
        queues: Sequence[Queue],
        generations: Generations,
        health: Health,
        state: State,
        now_ms: int,
    ) -> None:
        self.now_ms = now_ms
        self._version = version
        self._fw = fw
        self._links = links
        self._queues = queues
        self._generations = generations
        self._health = health
        self._state = state
        self._started_ms = now_ms

    def rows(self, asked: Asked) -> Iterator[api.Status] | None:
        """Begin to answer a command; None if it is another."""
        return iter([self.status()]) if asked.command == "status" else None

    def status(self) -> api.Status:
        """Describe the daemon as a whole."""
        net, ruleset = self._fw.net, self._fw.ruleset
        zones = {number: name for name, number in ruleset.zones.items()}
        problems = self._health.problems()
        return api.Status(
            version=self._version,
            core="compiled" if compiled() else "pure",
            pid=os.getpid(),
            uptime_seconds=(self.now_ms - self._started_ms) // 1000,
            config=self._generations.file,
            generation=ruleset.generation,
            flows=net.table.count,
            flows_max=net.sysctl.max,
            unconfirmed=net.table.unconfirmed_count(),
            unconfirmed_max=net.sysctl.unconfirmed_max,
            health=word(problems),
            problems=problems,
            limits=self._health.limits(),
            packets_per_second=self._health.packets_per_second,
            policy=self._generations.row(),
            trial_seconds=self._generations.trial_seconds(),
            queues=queue_statuses(self._queues),
            interfaces=[
                api.Interface(index, name, zones.get(ruleset.zone_of.get(index, -1)))
                for index, name in sorted(self._links.names.items())
            ],
            state=self._state.status(),
        )


def queue_statuses(queues: Sequence[Queue]) -> list[api.QueueStatus]:
    """Describe the two queues, from both sides."""
    kernel = kernel_queues()
    statuses = []
    for queue, hooks in zip(queues, HOOKS, strict=True):
        known = kernel.get(queue.number, NOTHING_KNOWN)
        statuses.append(
            api.QueueStatus(
                number=queue.number,
                hooks=hooks,
                max_length=queue.max_length,
                packets=queue.packets,
                dropped=queue.dropped,
                errors=queue.errors,
                verdict_errors=queue.verdict_errors,
                overruns=queue.overruns,
                latency_us=dict(zip(LATENCY_LABELS, queue.latency, strict=True)),
                socket_buffer=queue.socket_memory()[1],
                waiting=known.waiting,
                dropped_full=known.dropped_full,
                dropped_socket=known.dropped_socket,
            )
        )
    return statuses
