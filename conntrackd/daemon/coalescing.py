"""How long the loop waits when it has emptied the queues, so that it wakes up for several packets at once.

Waking up costs more than a packet does; a network card spares its interrupts in the same way. Only small packets are
waited for, and only when they are many. Big ones are mostly of bulk TCP, which sends no more than its window until it
is answered: what the loop waits, it waits, too, and each of them is worth a wake-up.
"""

from collections.abc import Sequence
from typing import Final

from conntrackd.daemon.queue import Queue

LOOK_MS: Final = 10
MANY: Final = 20  # packets per millisecond
SMALL_BYTES: Final = 1000  # on average, of the kernel's messages with the packets in them
TOGETHER: Final = 6  # packets for which it is worth to wake up
PAUSE_MAX_S: Final = 200e-6
# A shorter one would be as long, for timers are late; and so many come together by themselves.
PAUSE_MIN_S: Final = 100e-6


class Coalescing:
    """The pause, as the packets of the last moments make it."""

    def __init__(self, queues: Sequence[Queue], now_ms: int) -> None:
        self.pause_s = 0.0
        self.look_ms = now_ms  # when it is time to look again
        self._queues = queues
        self._looked_ms = now_ms
        self._packets = self._bytes = 0

    def look(self, now_ms: int) -> None:
        """See what has come since the last look."""
        packets = sum(queue.packets for queue in self._queues)
        size = sum(queue.message_bytes for queue in self._queues)
        came, came_bytes, took_ms = packets - self._packets, size - self._bytes, now_ms - self._looked_ms
        self.pause_s = 0.0
        if came > MANY * took_ms and came_bytes < SMALL_BYTES * came:
            pause_s = TOGETHER * took_ms / came / 1000
            self.pause_s = min(pause_s, PAUSE_MAX_S) if pause_s >= PAUSE_MIN_S else 0.0
        self._packets, self._bytes = packets, size
        self._looked_ms, self.look_ms = now_ms, now_ms + LOOK_MS
