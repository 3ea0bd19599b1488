"""Short slices of `make soak` and of `make soak-flood`, `soak-restart`, `soak-stop` and `soak-kill`."""

from tests.soak.__main__ import kill, restart, stop
from tests.soak.overload import churn, flood


def test_restarts_under_load_break_and_lose_nothing() -> None:
    result = restart(rounds=1)
    assert result.broken() == 0, result.text()
    assert result.talk["lost"] == result.talk["unopened"] == result.dropped_by_kernel == 0, result.text()


def test_stops_under_load_break_nothing() -> None:
    result = stop(rounds=1)
    assert result.broken() == 0, result.text()


def test_kills_under_load_are_survived() -> None:
    result = kill(rounds=2, seed=7, crowd=1000)
    assert result.known_broken() == 0, result.text()


def test_full_rate_leaves_nothing_behind() -> None:
    result = churn(seconds=2)
    assert result.connections > 0
    assert result.left() == 0, result


def test_a_flood_is_counted_to_the_packet() -> None:
    result = flood("both", seconds=2)
    assert result.judged > 0
    assert result.miscounted == 0, result
