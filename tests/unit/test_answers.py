"""What the control socket says about drops and counters, in the words of the contract."""

import pytest

from conntrackd.daemon.control import Asked
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


def test_stats_name_every_reason(lab: Lab) -> None:
    lab.send(craft.tcp(SYN, 1))
    lab.send(craft.tcp(SYN | ACK, 5, 9, sport=7), GONE)
    (stats,) = lab.ask("stats")
    assert (stats["insert"], stats["invalid"], stats["created"]) == (1, 1, 1)
    assert (stats["ctinfo"]["new"], stats["ctinfo"]["tcp_new"], stats["ctinfo"]["table_full"]) == (1, 1, 0)
    assert stats["drops"] == {"tcp_new": 1}
    assert {"name": "out", "action": "accept", "hits": 1} in stats["rules"]


def test_unknown_command(lab: Lab) -> None:
    assert lab.answers.rows(Asked("fly", {})) is None
