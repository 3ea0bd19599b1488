"""What the control socket says about connections and drops, in the words of the contract."""

import json
from typing import Any

import msgspec
import pytest

from conntrackd import config
from conntrackd.const import (
    DROP,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    MARK_UNCONFIRMED,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
)
from conntrackd.core.conntrack import set_labels
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.answers import Answers
from conntrackd.daemon.control import QUIET, Asked
from conntrackd.daemon.links import Links
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.queue import Queue
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from tests.differential.packets import ACK, SYN
from tests.unit import craft

POLICY = b"""
version = 1
[zones]
lan = { interfaces = ["lan0"] }
wan = { interfaces = ["wan0"] }
[[rule]]
name = "out"
from = "lan"
to = "wan"
action = "accept"
"""
LAN, WAN, GONE = 2, 3, 9
NAMES = {1: "lo", LAN: "lan0", WAN: "wan0"}
BEGIN = craft.START_MS


class Lab:
    """A firewall, its answers, and a clock."""

    def __init__(self) -> None:
        checked = config.parse(POLICY, "test.toml")
        rules = compile_ruleset(checked, 1)
        rules.set_links(NAMES)
        self.fw = Firewall(Conntrack(Sysctl()), rules)
        links = Links()
        links.close()
        links.names = NAMES
        mark = Mark(checked.queue.mark_mask)
        queues = (Queue(0, self.fw, mark, False), Queue(1, self.fw, mark, False))
        self.answers = Answers("1.2.3", checked, "test.toml", self.fw, links, queues, BEGIN)

    def send(self, data: bytes, iif: int = LAN, oif: int = WAN) -> None:
        bits = pre_routing(self.fw, data, NF_INET_PRE_ROUTING, iif, self.answers.now_ms)
        if bits != DROP and bits & MARK_UNCONFIRMED:
            post_routing(self.fw, data, bits, NF_INET_POST_ROUTING, iif, oif, self.answers.now_ms)

    def ask(self, command: str) -> list[dict[str, Any]]:
        rows = self.answers.rows(Asked(command, {}))
        assert rows is not None
        return [json.loads(msgspec.json.encode(row)) for row in rows]


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_flow_is_the_contract_to_the_letter(lab: Lab) -> None:
    lab.send(craft.tcp(SYN, 1))
    lab.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
    lab.answers.now_ms += 2500
    assert lab.ask("flows") == [
        {
            "id": 1,
            "family": "ipv4",
            "protocol": "tcp",
            "protonum": 6,
            "zone": 0,
            "state": "SYN_RECV",
            "status": ["SEEN_REPLY", "CONFIRMED"],
            "timeout_seconds": 57,
            "age_seconds": 2,
            "orig": {
                "src": "10.0.0.5", "dst": "192.0.2.80", "sport": 40000, "dport": 80, "packets": 1, "bytes": 40,
            },
            "reply": {
                "src": "192.0.2.80", "dst": "10.0.0.5", "sport": 80, "dport": 40000, "packets": 1, "bytes": 40,
            },
            "mark": 0,
            "helper": None,
            "master": None,
            "rule": "out",
            "in": "lan0",
            "out": "wan0",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "protonum", "payload", "named", "orig", "reply"),
    [
        (4, IPPROTO_ICMP, "0800f7fa00010004", "icmp",
         {"type": 8, "code": 0, "id": 1}, {"type": 0, "code": 0, "id": 1}),
        (4, IPPROTO_GRE, "2001880b0000000900000001", "gre", {"srckey": 0, "dstkey": 9}, {"srckey": 9, "dstkey": 0}),
        (4, 50, "0102030405060708", "proto-50", {}, {}),
        (6, 50, "0102030405060708", "proto-50", {}, {}),
    ],
)  # fmt: skip
def test_what_stands_for_ports(
    lab: Lab, family: int, protonum: int, payload: str, named: str, orig: dict[str, int], reply: dict[str, int]
) -> None:
    lab.send(craft.ip(protonum, bytes.fromhex(payload), family=family))
    (flow,) = lab.ask("flows")
    assert (flow["protocol"], flow["family"], flow["state"]) == (named, f"ipv{family}", None)
    common = {"src", "dst", "packets", "bytes"}
    assert {name: value for name, value in flow["orig"].items() if name not in common} == orig
    assert {name: value for name, value in flow["reply"].items() if name not in common} == reply


def test_flows_change_under_a_reader(lab: Lab) -> None:
    """What expires or comes in between is left out, and everything else is there once."""
    for port in range(1000, 1010):
        lab.send(craft.udp(sport=port))
    rows = lab.answers.flows()
    seen = [next(rows).orig.sport for _ in range(5)]
    gone = next(port for port in range(1000, 1010) if port not in seen)
    for ct in lab.fw.net.table.connections():
        if int.from_bytes(ct.orig[9:11], "big") == gone:
            lab.fw.net.table.kill(ct, BEGIN)
    lab.send(craft.udp(sport=2000))  # may be there or not
    seen += [row.orig.sport for row in rows]
    assert {*seen} - {2000} == {port for port in range(1000, 1010) if port != gone}
    assert len(seen) == len({*seen})
    lab.answers.now_ms += 30_000
    assert lab.ask("flows") == []


def test_labels_are_shown_where_there_are_any(lab: Lab) -> None:
    lab.send(craft.udp())
    (ct,) = lab.fw.net.table.connections()
    assert "labels" not in lab.ask("flows")[0]
    set_labels(lab.fw.net, ct, 1 << 127 | 5, BEGIN)
    assert lab.ask("flows")[0]["labels"] == "80000000000000000000000000000005"


def test_events_say_what_a_connection_was_like_then(lab: Lab) -> None:
    rows = lab.answers.events()
    assert next(rows) is QUIET
    lab.send(craft.tcp(SYN, 1))
    lab.answers.now_ms += 2500
    lab.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
    lab.answers.now_ms += 1000
    new, update = [json.loads(msgspec.json.encode(next(rows))) for _ in range(2)]
    assert next(rows) is QUIET
    assert (new["type"], new["changes"], new["reason"]) == ("NEW", ["NEW"], None)
    assert (new["flow"]["state"], new["flow"]["timeout_seconds"], new["flow"]["age_seconds"]) == ("SYN_SENT", 120, 0)
    assert (update["type"], update["changes"]) == ("UPDATE", ["REPLY", "PROTOINFO"])
    assert (update["flow"]["state"], update["flow"]["age_seconds"]) == ("SYN_RECV", 2)
    (ct,) = lab.fw.net.table.connections()
    lab.fw.net.table.kill(ct, lab.answers.now_ms)
    destroy = json.loads(msgspec.json.encode(next(rows)))
    assert (destroy["type"], destroy["reason"]) == ("DESTROY", "killed")
    assert destroy["flow"]["reply"]["packets"] == 1
    del rows
    assert lab.fw.net.events.listeners == 0


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
        lab.answers.now_ms += 1
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
