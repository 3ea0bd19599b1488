"""Short slices of `make soak-restart`, `make soak-stop` and `make soak-kill`."""

from tests.soak.__main__ import kill, restart, stop


def test_restarts_under_load_break_and_lose_nothing() -> None:
    result = restart(rounds=1)
    assert result.broken() == 0, result.text()
    assert result.talk["lost"] == result.talk["unopened"] == result.dropped_by_kernel == 0, result.text()


def test_stops_under_load_break_nothing() -> None:
    result = stop(rounds=1)
    assert result.broken() == 0, result.text()


def test_kills_under_load_are_survived() -> None:
    result = kill(rounds=2, seed=1, crowd=1000)
    assert result.known_broken() == 0, result.text()
