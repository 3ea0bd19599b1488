"""Traces: what they say of a packet, which packets they choose, and that they never grow."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from conntrackd import api
from conntrackd.const import (
    DROP,
    MARK_UNCONFIRMED,
    NF_INET_LOCAL_IN,
    NF_INET_LOCAL_OUT,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
)
from conntrackd.daemon import trace
from conntrackd.daemon.control import QUIET
from tests.differential.packets import ACK, RST, SYN
from tests.unit import craft
from tests.unit.answering import LAN, WAN, Lab

Rows = Iterator[msgspec.Struct | None]


@pytest.fixture
def lab() -> Lab:
    return Lab()


def send(lab: Lab, data: bytes, iif: int = LAN, oif: int = WAN) -> None:
    """Let a packet cross the queues as they would."""
    first, second = lab.queues
    first.now_ms = second.now_ms = lab.now_ms
    crossing = [(first, NF_INET_PRE_ROUTING, 0), (second, NF_INET_POST_ROUTING, oif)]
    if iif == 0:
        crossing[0] = (first, NF_INET_LOCAL_OUT, oif)
    if oif == 0:
        crossing[1] = (second, NF_INET_LOCAL_IN, 0)
    mark = 0
    for queue, hook, way_out in crossing:
        if queue.tracing is None:
            bits = queue.judge(data, hook, mark, iif, way_out)
        else:
            bits = queue.tracing.judge(queue, data, hook, mark, iif, way_out)
        if bits == DROP or not bits & MARK_UNCONFIRMED:
            return
        mark = bits << 26


def begin(lab: Lab, text: str = "", **args: Any) -> Rows:
    rows = lab.begin("trace", filter=text, **args)
    assert isinstance(next(rows), api.TraceBegin)
    return rows


def told(rows: Rows) -> list[dict[str, Any]]:
    """What there is now."""
    found = []
    while (row := next(rows)) is not QUIET:
        found.append(json.loads(msgspec.json.encode(row)))
    return found


def test_every_step_of_a_connection(lab: Lab) -> None:
    rows = begin(lab)
    send(lab, craft.tcp(SYN, 1))
    send(lab, craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
    first, confirmed, answered = told(rows)
    packet = {
        "family": "ipv4", "protocol": "tcp", "protonum": 6,
        **{end: first["packet"][end] for end in ("src", "dst", "sport", "dport")},
    }  # fmt: skip
    assert first == {
        "type": "STEP", "time": first["time"], "hook": "PREROUTING", "packet": packet, "in": "lan0", "out": None,
        "length": 40, "zone": 0, "flow": None, "class": "NEW", "ctinfo": "new",
        "state_before": None, "state": "SYN_SENT", "status_before": [], "status": [],
        "rule": None, "verdict": "accept", "reason": None, "mark_before": 0, "mark": 0x28000000,
    }  # fmt: skip
    assert confirmed["hook"] == "POSTROUTING"
    assert (confirmed["in"], confirmed["out"]) == ("lan0", "wan0")
    assert (confirmed["rule"], confirmed["flow"], confirmed["ctinfo"]) == ("out", 1, None)
    assert (confirmed["status_before"], confirmed["status"]) == ([], ["CONFIRMED"])
    assert (confirmed["mark_before"], confirmed["mark"]) == (0x28000000, 0x20000000)
    assert (answered["state_before"], answered["state"]) == ("SYN_SENT", "SYN_RECV")
    assert (answered["class"], answered["ctinfo"], answered["rule"]) == ("ESTABLISHED", "established_reply", "out")


def test_a_drop_has_its_rule_and_reason_and_is_found_by_them(lab: Lab) -> None:
    by_rule, others = begin(lab, "rule default-forward"), begin(lab, "rule out")
    send(lab, craft.tcp(SYN, 1), WAN, LAN)
    (step,) = told(by_rule)
    assert (step["verdict"], step["reason"], step["rule"]) == ("drop", "policy", "default-forward")
    assert (step["hook"], step["class"], step["mark"]) == ("POSTROUTING", "NEW", step["mark_before"])
    assert told(others) == []


def test_invalid_packets_have_no_connection_and_are_found_by_their_tuple(lab: Lab) -> None:
    port = f"dst port {craft.tcp(RST, 1)[22] << 8 | craft.tcp(RST, 1)[23]}"
    rows, others = begin(lab, port), begin(lab, "udp")
    send(lab, craft.tcp(RST, 1))
    send(lab, craft.tcp(RST, 1, back=True), WAN, LAN)  # a stray answer of such a connection
    steps = told(rows)
    assert [(step["class"], step["ctinfo"], step["reason"]) for step in steps] == [
        ("INVALID", "tcp_new", "tcp_new")
    ] * 2
    assert told(others) == []


def test_a_packet_without_a_tuple_is_seen_without_a_filter_only(lab: Lab) -> None:
    everything, chosen = begin(lab), begin(lab, "all")
    send(lab, b"\x45\0")
    (step,) = told(everything)
    assert (step["packet"], step["reason"]) == (None, "ip_header")
    assert told(chosen) == []


def test_an_icmp_error_belongs_to_the_connection_it_quotes(lab: Lab) -> None:
    send(lab, craft.udp())
    rows = begin(lab, "udp")
    send(lab, craft.error(craft.udp()), WAN, LAN)
    (step,) = told(rows)
    assert (step["class"], step["flow"]) == ("RELATED", 1)


def test_bytes_only_where_they_are_wanted_and_no_more_than_the_limit(lab: Lab) -> None:
    without, having = begin(lab), begin(lab, bytes=True)
    send(lab, craft.udp(bytes(3000)))
    assert "data" not in told(without)[0]
    row = next(having)
    assert isinstance(row, api.TraceStep)
    assert row.data == craft.udp(bytes(3000))[: trace.BYTES_MAX]
    assert row.length == 3028
    with pytest.raises(api.RequestError, match="needs root"):
        lab.begin("trace", uid=12345, filter="", bytes=True)


def test_a_slow_client_loses_the_oldest_steps_and_is_told(lab: Lab) -> None:
    rows = begin(lab)
    for second in range(3):
        for _ in range(700):
            send(lab, b"")
        lab.wait(1)
        assert second < 3
    lost, *steps = told(rows)
    assert lost == {"type": "LOST", "steps": 2100 - trace.STEPS_MAX, "packets": 0}
    assert len(steps) == trace.STEPS_MAX


def test_no_more_steps_in_a_second_than_the_limit(lab: Lab) -> None:
    rows = begin(lab)
    for _ in range(trace.STEPS_PER_SECOND + 7):
        send(lab, b"")
    lost, *steps = told(rows)
    assert (lost["steps"], len(steps)) == (7, trace.STEPS_PER_SECOND)
    lab.wait(1)
    send(lab, b"")
    assert len(told(rows)) == 1


def test_no_more_packets_looked_at_in_a_second_than_the_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LOOKS_PER_SECOND", 5)
    rows = begin(lab, "udp")
    for _ in range(8):
        send(lab, b"")
    assert told(rows) == [{"type": "LOST", "steps": 0, "packets": 3}]


def test_the_path_is_free_again_when_the_last_trace_ends(lab: Lab) -> None:
    first, second = begin(lab), begin(lab)
    del first
    assert lab.queues[0].tracing is lab.queues[1].tracing is lab.tracing
    del second
    assert lab.queues[0].tracing is lab.queues[1].tracing is None


def test_few_traces_at_a_time(lab: Lab) -> None:
    rows = [begin(lab) for _ in range(trace.TRACES_MAX)]
    with pytest.raises(api.RequestError, match="end one of them"):
        lab.begin("trace", filter="")
    rows.pop()
    begin(lab)


@pytest.mark.parametrize("args", [{"filter": "tcp dport"}, {"filter": 7}, {"bytes": "yes"}, {"pcap": "x"}])
def test_bad_arguments_are_refused(lab: Lab, args: dict[str, Any]) -> None:
    with pytest.raises(api.RequestError):
        lab.begin("trace", **args)
    assert lab.queues[0].tracing is None


def test_a_trace_that_fails_costs_no_packet_its_verdict(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = begin(lab)
    monkeypatch.setattr(trace, "_rule", None)
    send(lab, craft.tcp(SYN, 1))
    assert lab.fw.net.table.count == 1
    assert told(rows) == []
