"""What the control socket says about connections, in the words of the contract, and how it ends them."""

import json
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from conntrackd import api, config
from conntrackd.api import RequestError
from conntrackd.const import CLOSED_KILLED, IPPROTO_GRE, IPPROTO_ICMP, IPPROTO_UDP
from conntrackd.core.conntrack import set_labels
from conntrackd.core.expect import ANY_PORT, EXPECT_OK, expect_from
from conntrackd.core.helper import assign_helper
from conntrackd.core.helpers import HELPERS
from conntrackd.daemon.control import MORE, QUIET
from conntrackd.policy.compile import compile as compile_ruleset
from tests.differential.packets import ACK, SYN, chunk
from tests.unit import craft
from tests.unit.answering import BEGIN, LAN, NAMES, POLICY, WAN, Lab


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_flow_is_the_contract_to_the_letter(lab: Lab) -> None:
    lab.send(craft.tcp(SYN, 1))
    lab.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
    lab.wait(2.5)
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
            "idle_seconds": 2,
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


def test_verification_tags_stand_at_their_direction(lab: Lab) -> None:
    lab.send(craft.sctp(0, chunk(1, 0, craft.sctp_init(5))))
    lab.send(craft.sctp(5, chunk(2, 0, craft.sctp_init(6)), back=True), WAN, LAN)
    (row,) = lab.ask("flow", id=1)
    assert (row["orig"]["vtag"], row["reply"]["vtag"]) == (6, 5)
    assert lab.ask("flows")[0]["orig"] == row["orig"]


def test_flows_change_under_a_reader(lab: Lab) -> None:
    """What expires or comes in between is left out, and everything else is there once."""
    for port in range(1000, 1010):
        lab.send(craft.udp(sport=port))
    rows = (row for row in lab.begin("flows") if isinstance(row, api.Flow))
    seen = [next(rows).orig.sport for _ in range(5)]
    gone = next(port for port in range(1000, 1010) if port not in seen)
    for ct in lab.fw.net.table.connections():
        if int.from_bytes(ct.orig[9:11], "big") == gone:
            lab.fw.net.table.kill(ct, BEGIN)
    lab.send(craft.udp(sport=2000))  # may be there or not
    seen += [row.orig.sport for row in rows]
    assert {*seen} - {2000} == {port for port in range(1000, 1010) if port != gone}
    assert len(seen) == len({*seen})
    lab.wait(30)
    assert lab.ask("flows") == []


def test_a_long_list_is_whole_while_the_table_changes(lab: Lab) -> None:
    """Between any two rows connections come, go and carry packets: each that is there all the time is listed once."""
    for port in range(1, 20_001):
        lab.send(craft.udp(sport=port))
    stay = {ct.id for ct in lab.connections() if ct.id % 4}
    go = [ct for ct in lab.connections() if ct.id % 4 == 0]
    seen = []
    for row in lab.begin("flows"):
        if not isinstance(row, api.Flow):
            continue
        seen.append(row.id)
        assert row.orig.bytes == row.orig.packets * 28  # of one moment
        if go and len(seen) % 3 == 0:
            lab.fw.net.table.kill(go.pop(), lab.now_ms)
            lab.send(craft.udp(sport=len(seen), dport=53))  # another begins
            lab.send(craft.udp(sport=len(seen)))  # and one of them carries a packet, or begins anew
    assert len(seen) == len({*seen})
    assert stay <= {*seen}
    assert len(go) < 1000


def test_labels_are_shown_where_there_are_any(lab: Lab) -> None:
    lab.send(craft.udp())
    (ct,) = lab.fw.net.table.connections()
    assert "labels" not in lab.ask("flows")[0]
    lab.fw.ruleset.labels = {2: "voip", 127: "last"}
    set_labels(lab.fw.net, ct, 1 << 127 | 5, BEGIN)
    assert lab.ask("flows")[0]["labels"] == ["0", "voip", "last"]
    assert lab.ask("flow", id=1)[0]["labels"] == ["0", "voip", "last"]


LABELS = b"""
[labels]
voip = 0
guest = 1
old = 127
"""


def labelled_lab() -> Lab:
    """Connections to port 80 have labels of their rule; others have none."""
    lab = Lab()
    text = POLICY.replace(b"[[rule]]", LABELS + b'[[rule]]\nname = "web"\nprotocol = "udp"\nport = 80\n'
                          b'labels = ["voip", "old"]\naction = "accept"\n[[rule]]')  # fmt: skip
    lab.fw.ruleset = compile_ruleset(config.parse(text, "test.toml"), 1)
    lab.fw.ruleset.set_links(NAMES)
    return lab


def test_a_rule_labels_what_it_admits_and_events_say_so() -> None:
    lab = labelled_lab()
    rows = lab.begin("events", filter="label voip")
    assert next(rows) is QUIET
    lab.send(craft.udp())
    lab.send(craft.udp(dport=81))
    lab.ask("label", action="del", labels=["voip"], filter="label old")
    lab.ask("label", action="add", labels=["voip", "9"], filter="all")
    lab.ask("kill", filter="all")
    told = [json.loads(msgspec.json.encode(row)) for row in (next(rows) for _ in range(20)) if row not in (QUIET, MORE)]
    assert [(row["changes"], row["flow"]["labels"]) for row in told if row["flow"]["id"] == 1] == [
        (["NEW", "LABEL"], ["voip", "old"]),
        (["LABEL"], ["voip", "9", "old"]),
        (["DESTROY"], ["voip", "9", "old"]),
    ]
    assert [(row["changes"], row["flow"]["labels"]) for row in told if row["flow"]["id"] == 2] == [
        (["LABEL"], ["voip", "9"]),
        (["DESTROY"], ["voip", "9"]),
    ]
    assert lab.fw.net.table.labels == {}


def test_labels_change_by_request() -> None:
    lab = labelled_lab()
    for port in (80, 81, 82):
        lab.send(craft.udp(dport=port))
    assert lab.ask("label", action="list") == [
        {"name": "voip", "bit": 0}, {"name": "guest", "bit": 1}, {"name": "old", "bit": 127},
    ]  # fmt: skip
    with capture_logs() as logs:
        changed = lab.ask("label", action="add", labels=["voip", "1"], filter="port 80,81")
    assert {row["id"]: row["labels"] for row in changed} == {1: ["voip", "guest", "old"], 2: ["voip", "guest"]}
    assert (logs[0]["event"], logs[0]["count"], logs[0]["labels"]) == ("labels_changed", 2, ["voip", "1"])
    assert lab.ask("label", action="add", labels=["guest"], filter="port 80,81") == []  # they had it
    (row,) = lab.ask("label", action="del", labels=["guest", "old"], filter="port 80")
    assert row["labels"] == ["voip"]
    assert {row["id"] for row in lab.ask("label", action="del", filter="all")} == {1, 2}
    assert lab.fw.net.table.labels == {}
    # What was killed is told with the labels that it had.
    lab.ask("label", action="add", labels=["old"], filter="port 82")
    assert [row["labels"] for row in lab.ask("kill", filter="label old")] == [["old"]]


@pytest.mark.parametrize(
    ("args", "uid", "sentence"),
    [
        ({"action": "add", "labels": ["vopi"], "filter": "all"}, 0, "There is no label 'vopi'; did you mean 'voip'?"),
        ({"action": "add", "labels": ["128"], "filter": "all"}, 0, "There is no label '128': define it in [labels]."),
        ({"action": "add", "labels": ["voip"], "filter": "label gest"}, 0, "There is no label 'gest'; did you mean"),
        ({"action": "del", "labels": ["voip"]}, 0, "Labels of which flows? The filter `all` is all of them."),
        ({"action": "del", "labels": ["voip"], "filter": "all"}, 65534, "Changing labels needs root, and you are "),
        ({"action": "set"}, 0, "The arguments of 'label' are not understood: "),
    ],
)
def test_labels_that_are_not_changed(args: dict[str, Any], uid: int, sentence: str) -> None:
    lab = labelled_lab()
    lab.send(craft.udp())
    with pytest.raises(RequestError) as refused:
        lab.ask("label", uid, **args)
    assert str(refused.value).startswith(sentence)
    assert lab.ask("flows")[0]["labels"] == ["voip", "old"]


def test_an_expected_connection_has_no_labels_of_its_master() -> None:
    """As in the kernel, which hands on the mark only."""
    lab = labelled_lab()
    lab.send(craft.udp())
    (master,) = lab.connections()
    master.mark = 7
    assign_helper(master, HELPERS["tftp"])
    expect = expect_from(master, 0, IPPROTO_UDP, craft.SERVER[4], ANY_PORT, craft.CLIENT[4], 9000)
    assert lab.fw.net.table.expectations.insert(expect, False, 10, lab.now_ms) == EXPECT_OK
    lab.send(craft.udp(back=True, sport=9000, dport=9001), WAN, LAN)
    (child,) = lab.ask("flows", filter="expected")
    assert (child["master"], child["mark"], "labels" in child) == (master.id, 7, False)


def test_a_policy_with_other_names_shows_the_same_bits() -> None:
    lab = labelled_lab()
    lab.send(craft.udp())
    lab.fw.ruleset.labels = {0: "guest", 1: "voip"}
    assert lab.ask("flows")[0]["labels"] == ["guest", "127"]
    assert [row["id"] for row in lab.ask("flows", filter="label guest")] == [1]
    assert lab.ask("flows", filter="label voip") == []


def test_events_say_what_a_connection_was_like_then(lab: Lab) -> None:
    rows = lab.begin("events")
    assert next(rows) is QUIET
    lab.send(craft.tcp(SYN, 1))
    lab.wait(2.5)
    lab.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
    lab.wait(1)
    new, update = [json.loads(msgspec.json.encode(next(rows))) for _ in range(2)]
    assert next(rows) is QUIET
    assert (new["type"], new["changes"], new["reason"]) == ("NEW", ["NEW"], None)
    assert (new["flow"]["state"], new["flow"]["timeout_seconds"], new["flow"]["age_seconds"]) == ("SYN_SENT", 120, 0)
    assert (update["type"], update["changes"]) == ("UPDATE", ["REPLY", "PROTOINFO"])
    assert (update["flow"]["state"], update["flow"]["age_seconds"]) == ("SYN_RECV", 2)
    (ct,) = lab.fw.net.table.connections()
    lab.fw.net.table.kill(ct, lab.now_ms)
    destroy = json.loads(msgspec.json.encode(next(rows)))
    assert (destroy["type"], destroy["reason"]) == ("DESTROY", "killed")
    assert destroy["flow"]["reply"]["packets"] == 1
    del rows
    assert lab.fw.net.events.listeners == 0


# --- Filters ------------------------------------------------------------------------------------------------------


def open_some(lab: Lab) -> None:
    """Four datagrams, and a TCP connection with an answer."""
    for port in range(1000, 1004):
        lab.send(craft.udp(sport=port))
    lab.send(craft.tcp(SYN, 1))
    lab.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)


def test_a_filter_chooses_flows(lab: Lab) -> None:
    open_some(lab)
    assert {flow["orig"]["sport"] for flow in lab.ask("flows", filter="src port 1001-1002")} == {1001, 1002}
    assert [flow["protocol"] for flow in lab.ask("flows", filter="not unreplied")] == ["tcp"]
    assert lab.ask("count", filter="udp") == [{"count": 4}]
    assert lab.ask("count") == lab.ask("count", filter="all") == [{"count": 5}]


def test_what_has_expired_is_not_there(lab: Lab) -> None:
    open_some(lab)
    lab.wait(31)  # longer than an unreplied datagram has
    assert lab.ask("count") == [{"count": 1}]
    assert lab.ask("kill", filter="udp") == []


def test_looking_in_vain_is_done_in_slices(lab: Lab) -> None:
    for port in range(1000, 1200):
        lab.send(craft.udp(sport=port))
    rows = list(lab.begin("flows", filter="tcp"))
    assert rows == [MORE] * len(rows)
    assert 10 <= len(rows) <= 20
    # A filter that takes longer takes more of them.
    assert list(lab.begin("flows", filter=" or ".join(["tcp"] * 100))) == [MORE] * 200


def test_kill_ends_what_the_filter_chooses_and_tells_which(lab: Lab) -> None:
    open_some(lab)
    with capture_logs() as logs:
        rows = lab.ask("kill", filter="udp and src port 1001-65535 or zone 7")
    assert {row["orig"]["sport"] for row in rows} == {1001, 1002, 1003}
    assert lab.ask("count", filter="udp") == [{"count": 1}]
    assert lab.fw.net.stats.closed[CLOSED_KILLED] == 3
    (line,) = logs
    assert (line["event"], line["count"], line["who"], line["pid"]) == ("flows_killed", 3, "root", 4711)
    assert line["filter"].startswith("udp and")
    assert lab.ask("kill", filter="udp and src port 1001") == []


def test_a_dry_run_tells_the_same_and_ends_nothing(lab: Lab) -> None:
    open_some(lab)
    with capture_logs() as logs:
        rows = lab.ask("kill", uid=4242, filter="udp", dry_run=True)
    assert len(rows) == 4
    assert logs == []
    assert lab.ask("count") == [{"count": 5}]


def test_only_root_kills(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    open_some(lab)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(RequestError, match="Killing flows needs root, and you are uid 4242"):
        lab.ask("kill", uid=4242, filter="udp")
    assert lab.ask("count") == [{"count": 5}]


def test_kill_goes_on_whoever_listens(lab: Lab) -> None:
    """All are ended before the first is told; a client that leaves before ends it there, and the log says how far."""
    for port in range(1000, 1100):
        lab.send(craft.udp(sport=port))
    rows = lab.begin("kill", filter="src port 1000-1049")
    first = next(row for row in rows if isinstance(row, api.Flow))
    assert first.orig.sport in range(1000, 1050)
    assert lab.ask("count") == [{"count": 50}]
    with capture_logs() as logs:
        rows = lab.begin("kill", filter="all")
        next(rows)
        del rows
    (left,) = lab.ask("count")
    assert [line["count"] for line in logs] == [50 - left["count"]]


@pytest.mark.parametrize("command", ["flows", "count", "events", "kill"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"filter": "tcp and"}, r"not understood: it ends where a condition is expected\.\n  tcp and\n +\^$"),
        ({"filter": "tcp", "dryrun": True}, "unknown field `dryrun`"),
        ({"filtre": "tcp"}, "not understood: Object "),
        ({"filter": 7}, r"Expected `str`, got `int` - at `\$.filter`"),
        ({"filter": None}, "Expected `str`, got `null`"),
    ],
)
def test_arguments_that_are_wrong(lab: Lab, command: str, args: dict[str, Any], says: str) -> None:
    open_some(lab)
    with pytest.raises(RequestError, match=says):
        lab.ask(command, **args)
    assert lab.ask("count") == [{"count": 5}]
    assert lab.fw.net.events.listeners == 0


@pytest.mark.parametrize("text", ["", "  "])
def test_kill_without_a_filter_kills_nothing(lab: Lab, text: str) -> None:
    open_some(lab)
    with pytest.raises(RequestError, match="The filter `all` is all of them"):
        lab.ask("kill", filter=text)
    assert lab.ask("count") == [{"count": 5}]
    assert len(lab.ask("kill", filter="all")) == 5


def test_events_of_a_filter(lab: Lab) -> None:
    """They are judged by what the connection was then."""
    rows = lab.begin("events", filter="tcp and state SYN_SENT or udp and src port 1007")
    assert next(rows) is QUIET
    for port in range(1000, 1100):
        lab.send(craft.udp(sport=port))
    lab.send(craft.tcp(SYN, 1))
    lab.send(craft.tcp(SYN | ACK, 1, 2, back=True), WAN, LAN)
    heard = []
    while (row := next(rows)) is not QUIET:
        heard.append(row)
    events = [row for row in heard if isinstance(row, api.Event)]
    assert [(event.type, event.flow.protocol, event.flow.state) for event in events] == [
        ("NEW", "udp", None), ("NEW", "tcp", "SYN_SENT"),
    ]  # fmt: skip
    assert heard.count(MORE) >= 5


# --- What is expected ---------------------------------------------------------------------------------------------


def expect_an_answer(lab: Lab) -> None:
    """A connection to port 69 expects its answer from any port."""
    lab.send(craft.udp(dport=69))
    (ct,) = lab.connections()
    ct.help = HELPERS["tftp"].new_help()
    expect = expect_from(ct, 0, IPPROTO_UDP, craft.SERVER[4], ANY_PORT, craft.CLIENT[4], craft.SPORT)
    assert lab.fw.net.table.expectations.insert(expect, False, 0, lab.now_ms) == EXPECT_OK


def test_what_connections_expect_is_killed_and_they_go_on(lab: Lab) -> None:
    expect_an_answer(lab)
    assert lab.ask("kill", filter="dst port 70", expected=True) == []
    (row,) = lab.ask("kill", uid=4242, filter="dst port 69", expected=True, dry_run=True)
    assert (row["helper"], row["src"], row["dport"]) == ("tftp", "192.0.2.80", craft.SPORT)
    assert len(lab.ask("expectations")) == 1
    with capture_logs() as logs:
        assert lab.ask("kill", filter="dst port 69", expected=True) == [row]
    assert [(line["event"], line["count"], line["who"]) for line in logs] == [("expectations_killed", 1, "root")]
    assert lab.ask("expectations") == []
    assert lab.ask("count") == [{"count": 1}]


def test_events_of_expectations_are_for_those_who_ask(lab: Lab) -> None:
    of_connections, of_expectations = lab.begin("events"), lab.begin("events", expected=True)
    assert next(of_connections) is next(of_expectations) is QUIET
    expect_an_answer(lab)
    lab.ask("kill", filter="all", expected=True)
    events = [row for row in (next(of_expectations) for _ in range(4)) if isinstance(row, api.ExpectationEvent)]
    assert [(event.type, event.expectation.id) for event in events] == [("NEW", 1), ("DESTROY", 1)]
    told = [row for row in (next(of_connections) for _ in range(4)) if isinstance(row, api.Event)]
    assert [(event.type, event.flow.orig.dport) for event in told] == [("NEW", 69)]
