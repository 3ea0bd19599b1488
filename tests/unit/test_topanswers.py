"""What `top` is told: who leads, by what, and since when; a few at a time, and nothing is kept for nobody."""

from socket import AF_INET6, inet_ntop
from typing import Any

import pytest

from conntrackd import api
from conntrackd.daemon import topanswers
from conntrackd.daemon.control import MORE
from tests.unit import craft
from tests.unit.answering import Lab


@pytest.fixture
def lab() -> Lab:
    return Lab()


def top(lab: Lab, **args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first row, and the others."""
    head, *rows = lab.ask("top", **args)
    return head, rows


def ports(rows: list[dict[str, Any]]) -> list[int]:
    return [row["flow"]["orig"]["sport"] for row in rows]


def test_rates_are_what_was_carried_since_the_walk_before(lab: Lab) -> None:
    lab.send(craft.udp(sport=1))
    lab.send(craft.udp(sport=2))
    head, rows = top(lab)
    assert (head["flows"], head["chosen"], head["rate"]) == (2, 2, None)
    assert {row["rate"] for row in rows} == {None}
    lab.wait(2)
    lab.send(craft.udp(bytes(972), sport=2))  # 1000 bytes with its headers
    lab.send(craft.udp(bytes(72), sport=3))  # a new one: all of it counts
    head, rows = top(lab)
    assert (ports(rows), [row["rate"] for row in rows]) == ([2, 3, 1], [500, 50, 0])
    assert (head["rate"], head["packets"], head["bytes"]) == (550, 4, 28 + 28 + 1000 + 100)


def test_a_connection_that_was_quiet_for_long_has_no_rate_at_first(lab: Lab) -> None:
    lab.send(craft.udp(bytes(12)))
    lab.wait(20)
    top(lab)
    lab.wait(1)
    lab.send(craft.udp(bytes(12)))
    assert top(lab)[1][0]["rate"] == 0
    lab.wait(1)
    lab.send(craft.udp(bytes(12)))
    assert top(lab)[1][0]["rate"] == 40


def test_who_asks_right_after_another_measures_since_the_same_walk(lab: Lab) -> None:
    lab.send(craft.udp(sport=1))
    top(lab)
    lab.wait(1)
    lab.send(craft.udp(bytes(72), sport=1))
    assert top(lab)[1][0]["rate"] == 100
    lab.wait(0.1)
    assert top(lab)[1][0]["rate"] == 0  # since the second walk
    lab.wait(0.1)
    lab.send(craft.udp(bytes(72), sport=1))
    assert top(lab)[1][0]["rate"] == 500  # within 200 ms of it


def test_orders_and_limit(lab: Lab) -> None:
    for sport, size, count in ((1, 10, 1), (2, 500, 1), (3, 0, 9)):
        for _ in range(count):
            lab.send(craft.udp(bytes(size), sport=sport))
        lab.wait(1)
    assert ports(top(lab, sort="bytes")[1]) == [2, 3, 1]
    assert ports(top(lab, sort="packets")[1]) == [3, 2, 1]
    assert ports(top(lab, sort="age")[1]) == [1, 2, 3]
    assert ports(top(lab, sort="bytes", limit=1)[1]) == [2]
    assert ports(top(lab, sort="bytes", filter="src port 1,3")[1]) == [3, 1]


def test_groups(lab: Lab) -> None:
    for sport in (1, 2, 3):
        lab.send(craft.udp(sport=sport))
    lab.send(craft.udp(family=6))
    ends = [inet_ntop(AF_INET6, end) for end in craft.ends(6, False)]
    _, rows = top(lab, by="src", sort="flows")
    assert [(row["key"], row["flows"], row["bytes"]) for row in rows] == [("10.0.0.5", 3, 84), (ends[0], 1, 48)]
    assert [row["key"] for row in top(lab, by="zone")[1]] == ["lan > wan"]
    assert [(row["key"], row["packets"]) for row in top(lab, by="rule")[1]] == [("out", 4)]
    assert [row["key"] for row in top(lab, by="dst", filter="ipv6")[1]] == [ends[1]]
    lab.wait(7)
    assert top(lab, by="rule")[1][0]["age_seconds"] == 7


def test_groups_have_a_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topanswers, "GROUPS_MAX", 1)
    lab.send(craft.udp())
    lab.send(craft.udp(family=6))
    rows = top(lab, by="src")[1]
    assert (len(rows), {row["flows"] for row in rows}) == (2, {1})
    assert "" in {row["key"] for row in rows}


def test_all_are_looked_at_a_few_at_a_time(lab: Lab) -> None:
    for sport in range(1, 2001):
        lab.send(craft.udp(sport=sport))
    rows = list(lab.begin("top", filter="udp", limit=3))
    assert sum(row is MORE for row in rows) >= 100
    assert len([row for row in rows if isinstance(row, api.TopFlow)]) == 3


def test_what_nobody_asks_for_is_forgotten(lab: Lab) -> None:
    lab.send(craft.udp())
    top(lab)
    lab.wait(31)
    lab.top_answers.tick()
    lab.send(craft.udp())
    assert top(lab)[0]["rate"] is None


@pytest.mark.parametrize(
    "args", [{"by": "color"}, {"sort": "name"}, {"limit": 0}, {"limit": 10**9}, {"filter": "tcp dport"}, {"n": 3}]
)
def test_bad_arguments_are_refused(lab: Lab, args: dict[str, Any]) -> None:
    with pytest.raises(api.RequestError):
        lab.begin("top", **args)
