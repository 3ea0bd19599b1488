"""Time goes by the boot clock or the monotonic one; sleeping and setting the wall clock are noticed, and told apart."""

import time

import pytest
from structlog.testing import capture_logs

from conntrackd.daemon.clock import Clock

SECONDS = 60


class Clocks(Clock):
    """Clocks that stand where the test puts them."""

    def __init__(self, through_suspend: bool) -> None:
        self.at = {time.CLOCK_BOOTTIME: 5_000, time.CLOCK_MONOTONIC: 4_000, time.CLOCK_REALTIME: 1_700_000_000_000}
        super().__init__(through_suspend)

    def read_ms(self, clock: int) -> int:
        return self.at[clock]

    def go_on(self, ms: int, *but: int) -> None:
        for clock in self.at:
            self.at[clock] += 0 if clock in but else ms


@pytest.fixture
def clock() -> Clocks:
    return Clocks(True)


def test_the_real_ones_are_whole_milliseconds_since_the_start() -> None:
    assert abs(Clock(True).now_ms() - time.clock_gettime(time.CLOCK_BOOTTIME) * 1000) < 60_000
    assert abs(Clock(False).now_ms() - time.clock_gettime(time.CLOCK_MONOTONIC) * 1000) < 60_000


@pytest.mark.parametrize(("through_suspend", "later_ms"), [(True, SECONDS * 1000), (False, 0)])
def test_the_setting_says_whether_sleep_counts(through_suspend: bool, later_ms: int) -> None:
    clock = Clocks(through_suspend)
    before_ms = clock.now_ms()
    clock.go_on(SECONDS * 1000, time.CLOCK_MONOTONIC)
    assert clock.now_ms() - before_ms == later_ms


def test_sleep_is_counted_once(clock: Clocks) -> None:
    clock.go_on(SECONDS * 1000, time.CLOCK_MONOTONIC)
    with capture_logs() as lines:
        clock.look()
        clock.go_on(1000)
        clock.look()
    assert [(line["event"], line["seconds"]) for line in lines] == [("suspended", SECONDS)]
    assert (clock.suspended, clock.set) == (1, 0)


@pytest.mark.parametrize("ms", [SECONDS * 1000, -SECONDS * 1000])
def test_a_wall_clock_that_is_set_is_counted_and_moves_nothing(clock: Clocks, ms: int) -> None:
    before_ms = clock.now_ms()
    clock.at[time.CLOCK_REALTIME] += ms
    with capture_logs() as lines:
        clock.look()
        clock.look()
    assert [(line["event"], line["seconds"]) for line in lines] == [("clock_set", ms // 1000)]
    assert (clock.suspended, clock.set) == (0, 1)
    assert clock.now_ms() == before_ms


def test_time_that_goes_by_is_nothing(clock: Clocks) -> None:
    with capture_logs() as lines:
        for ms in (1, 999, 1000, SECONDS * 1000, 7 * 24 * 3600 * 1000):
            clock.go_on(ms)
            clock.at[time.CLOCK_REALTIME] += 3  # corrected gently
            clock.look()
    assert lines == []
    assert (clock.suspended, clock.set) == (0, 0)
