"""The clocks: the one that everything expires by, and what happens to the others.

A timeout says how long the ends of a connection may be silent before it is over, and time goes by for them while this
machine sleeps, too: it is counted by CLOCK_BOOTTIME, which goes on in a suspended machine. With `suspend = "keep"` it
is CLOCK_MONOTONIC, which stands still meanwhile, as it does for the kernel's tracker. Neither can be set; the wall
clock is for people only.
"""

import time
from typing import Final

import structlog

SUSPENDED_MS: Final = 1_000  # shorter sleeps are none: the two clocks are not read at the same moment
SET_MS: Final = 1_000  # a wall clock that is corrected gently never leaps so far in a second
APART_MS: Final = 100  # a look that took longer says nothing

log = structlog.get_logger()


class Clock:
    """The time in whole milliseconds, and how often the machine slept or its wall clock was set."""

    def __init__(self, through_suspend: bool) -> None:
        self.suspended = 0
        self.set = 0
        self._clock = time.CLOCK_BOOTTIME if through_suspend else time.CLOCK_MONOTONIC
        self._asleep_ms, self._wall_ms, _ = self._apart()

    def now_ms(self) -> int:
        """Read the clock that every time in the daemon is of."""
        return self.read_ms(self._clock)

    def read_ms(self, clock: int) -> int:
        """Read one of the system's clocks."""
        return time.clock_gettime_ns(clock) // 1_000_000

    def look(self) -> bool:
        """See whether the clocks have gone apart, about once a second; say whether the machine slept."""
        asleep_ms, wall_ms, took_ms = self._apart()
        if took_ms > APART_MS:
            return False
        slept_ms = asleep_ms - self._asleep_ms
        if slept_ms > SUSPENDED_MS:
            self.suspended += 1
            log.warning("suspended", seconds=slept_ms // 1000)
        if abs(wall_ms - self._wall_ms) > SET_MS:
            self.set += 1
            log.warning("clock_set", seconds=(wall_ms - self._wall_ms) // 1000)
        self._asleep_ms, self._wall_ms = asleep_ms, wall_ms
        return slept_ms > SUSPENDED_MS

    def _apart(self) -> tuple[int, int, int]:
        """Give how far the boot clock is ahead of the monotonic one, the wall clock of it, and how long this took."""
        before_ms = self.read_ms(time.CLOCK_BOOTTIME)
        monotonic_ms, wall_ms = self.read_ms(time.CLOCK_MONOTONIC), self.read_ms(time.CLOCK_REALTIME)
        return before_ms - monotonic_ms, wall_ms - before_ms, self.read_ms(time.CLOCK_BOOTTIME) - before_ms
