"""A counter that has risen is a problem until it has stood still for a minute."""

import re
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from conntrackd import config
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.faults import COUNTERS, HELD_UP_MS, Faults
from conntrackd.daemon.health import ERROR, FILLING, LOSSES, RECENT_MS, WARNING
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset

BEGIN = 1_000_000


class Watched(Faults):
    """Faults, one of whose counters is the test's."""

    def __init__(self) -> None:
        self.lost = 0
        super().__init__(Firewall(Conntrack(Sysctl()), compile_ruleset(config.parse(b"version = 1\n", "test.toml"), 1)))
        self.watch("log_lost", lambda: self.lost)

    def look(self, now_ms: int, rested: bool = True, slept: bool = False) -> list[str]:
        """The names of what is a problem then."""
        self.tick(now_ms, rested, slept)
        return [problem.name for problem in self.problems()]


@pytest.fixture
def faults() -> Watched:
    return Watched()


def test_nothing_is_wrong(faults: Watched) -> None:
    with capture_logs() as lines:
        assert faults.look(BEGIN) == []
    assert lines == []
    assert faults.counts() == dict.fromkeys(COUNTERS, 0)


def test_a_risen_counter_is_a_problem_until_it_has_stood_still(faults: Watched) -> None:
    with capture_logs() as lines:
        faults.lost = 3
        faults.look(BEGIN)
        faults.lost = 5
        faults.look(BEGIN + 1000)
        (problem,) = faults.problems()
        assert (problem.name, problem.severity) == ("log_lost", WARNING)
        assert problem.message.startswith("5 lines")
        faults._ticked_ms = BEGIN + RECENT_MS  # the loop turned all the time
        assert faults.look(BEGIN + 1000 + RECENT_MS - 1) == ["log_lost"]
        assert faults.look(BEGIN + 1000 + RECENT_MS) == []
    assert [(line["event"], line["name"]) for line in lines] == [
        ("problem", "log_lost"),
        ("problem_over", "log_lost"),
    ]


def test_it_counts_from_where_it_began(faults: Watched) -> None:
    now_ms = BEGIN
    for _ in range(3):
        faults.lost += 2
        faults.look(now_ms, slept=True)
        assert [problem.message[:7] for problem in faults.problems()] == ["2 lines"]
        now_ms += RECENT_MS
        assert faults.look(now_ms, slept=True) == []
    assert faults.counts()["log_lost"] == 6


def test_a_second_without_rest_is_saturation(faults: Watched) -> None:
    faults.look(BEGIN)
    assert faults.look(BEGIN + 999, rested=False) == []
    assert faults.look(BEGIN + 1999, rested=False) == ["saturated"]
    assert faults.look(BEGIN + 2999, rested=True) == ["saturated"]
    assert faults.counts()["saturated"] == 1


def test_a_loop_that_comes_late_stood_still_unless_the_machine_slept(faults: Watched) -> None:
    faults.look(BEGIN)
    faults.look(BEGIN + HELD_UP_MS)
    assert faults.look(BEGIN + 100 * HELD_UP_MS, slept=True) == []
    assert faults.look(BEGIN + 102 * HELD_UP_MS) == ["held_up"]
    assert "more than a second, once:" in next(faults.problems()).message
    assert faults.counts()["held_up"] == 1


@pytest.mark.parametrize("name", COUNTERS)
def test_every_counter_has_a_sentence(name: str) -> None:
    assert COUNTERS[name].severity in (WARNING, ERROR)
    assert "17" in COUNTERS[name].message.format(count=17)
    assert COUNTERS[name].message.endswith(".")


def test_the_documentation_names_every_problem() -> None:
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    assert named >= {*COUNTERS, *LOSSES, *(f"{kind}_filling" for kind in FILLING)}
