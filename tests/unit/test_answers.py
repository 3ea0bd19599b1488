"""What the control socket says about drops and counters, in the words of the contract."""

from typing import Any

import pytest

from conntrackd import api, config, hooks
from conntrackd.daemon.control import Asked
from conntrackd.policy.compile import compile as compile_ruleset
from tests.differential.packets import ACK, SYN
from tests.unit import craft
from tests.unit.answering import GONE, LAN, WAN, Lab


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_drops_name_reason_rule_and_interfaces(lab: Lab) -> None:
    lab.send(craft.udp(back=True), WAN, LAN)
    lab.send(craft.tcp(SYN | ACK), GONE, LAN)
    lab.send(b"\x45")
    by_rule, invalid, unreadable = lab.ask("drops")
    assert (by_rule["reason"], by_rule["rule"]) == ("policy", "default-forward")
    assert (by_rule["protocol"], by_rule["src"], by_rule["sport"]) == ("udp", "192.0.2.80", 80)
    assert (by_rule["in"], by_rule["out"]) == ("wan0", "lan0")
    assert (invalid["reason"], invalid["rule"]) == ("tcp_new", None)
    assert (invalid["in"], invalid["out"]) == (f"if{GONE}", None)
    assert unreadable["reason"] == "ip_header"
    assert unreadable["family"] is unreadable["src"] is None
    assert "sport" not in unreadable


def test_drops_are_the_newest_in_order(lab: Lab) -> None:
    for port in range(3000):
        lab.send(craft.udp(sport=port, back=True), WAN, LAN)
        lab.wait(0.001)
    rows = lab.ask("drops")
    assert [row["dport"] for row in rows] == list(range(3000 - len(rows), 3000))
    assert len(rows) >= 1000
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_drops_that_a_filter_chooses_and_of_the_last_while(lab: Lab) -> None:
    lab.send(craft.udp(back=True), WAN, LAN)
    lab.send(b"\x45")
    lab.wait(10)
    lab.send(craft.tcp(SYN, 1, back=True), WAN, LAN)
    assert [row["protocol"] for row in lab.ask("drops", filter="rule default-forward")] == ["udp", "tcp"]
    assert [row["protocol"] for row in lab.ask("drops", filter="udp and in wan0 and out lan0")] == ["udp"]
    assert len(lab.ask("drops", filter="all")) == 2  # one without a tuple is no connection
    assert [row["protocol"] for row in lab.ask("drops", last_ms=5000)] == ["tcp"]
    assert len(lab.ask("drops", last_ms=10_000)) == 3
    bad: dict[str, Any]
    for bad in ({"filter": "tcp dport"}, {"last_ms": "long"}, {"last": 3}):
        with pytest.raises(api.RequestError):
            lab.ask("drops", **bad)


def test_as_many_drops_are_kept_as_the_contract_says() -> None:
    assert api.DROPS_KEPT == hooks.DROPS_MAX


def test_stats_name_every_reason(lab: Lab) -> None:
    lab.send(craft.tcp(SYN, 1))
    lab.send(craft.tcp(SYN | ACK, 5, 9, sport=7), GONE)
    (stats,) = lab.ask("stats")
    assert (stats["insert"], stats["invalid"], stats["created"]) == (1, 1, 1)
    assert (stats["ctinfo"]["new"], stats["ctinfo"]["tcp_new"], stats["ctinfo"]["table_full"]) == (1, 1, 0)
    assert stats["drops"] == {"tcp_new": 1}
    assert {"name": "out", "action": "accept", "hits": 1} in stats["rules"]


def test_stats_name_each_action(lab: Lab) -> None:
    text = b"version = 1\n[policy]\ndefault = 'reject'\n[[rule]]\nname = 'a'\naction = 'log'\n"
    lab.fw.ruleset = compile_ruleset(config.parse(text, "test.toml"), 2)
    (stats,) = lab.ask("stats")
    actions = {rule["name"]: rule["action"] for rule in stats["rules"]}
    assert (actions["a"], actions["default-forward"], actions["default-input"]) == ("log", "reject", "drop")


def test_unknown_command(lab: Lab) -> None:
    assert lab.answers.rows(Asked("fly", {})) is None
