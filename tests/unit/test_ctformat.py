"""The lines of conntrack(8), to the byte; the tests in namespaces compare them with the tool itself."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from conntrackd import api
from conntrackd.cli import ctformat
from conntrackd.cli.ctformat import Show, of_event, of_flow

NOW = 1_795_364_105.0
SHOW = Show()


@pytest.fixture(autouse=True)
def utc() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def web() -> api.Flow:
    return api.Flow(
        id=3049955548, family="ipv4", protocol="tcp", protonum=6, zone=0, state="ESTABLISHED",
        status=["SEEN_REPLY", "ASSURED", "CONFIRMED"], timeout_seconds=431997, age_seconds=3,
        orig=api.Direction(src="10.9.1.2", dst="10.9.2.2", sport=45044, dport=443, packets=4, bytes=221),
        reply=api.Direction(src="10.9.2.2", dst="10.9.1.2", sport=443, dport=45044, packets=3, bytes=169),
        mark=42, helper=None, master=None, rule="out", in_="lan0", out="wan0",
    )  # fmt: skip


def changed(**changes: object) -> api.Flow:
    return msgspec.structs.replace(web(), **changes)


def ping6() -> api.Flow:
    return changed(
        family="ipv6", protocol="icmpv6", protonum=58, state=None, status=["CONFIRMED"], timeout_seconds=28,
        orig=api.Direction(src="fd09:1::2", dst="fd09:2::2", type=128, code=0, id=8626, packets=1, bytes=104),
        reply=api.Direction(src="fd09:2::2", dst="fd09:1::2", type=129, code=0, id=8626, packets=0, bytes=0),
        mark=0,
    )  # fmt: skip


def event(kind: str, flow: api.Flow, *changes: str, reason: str | None = None) -> api.Event:
    when = "2026-11-22T16:15:05.410+00:00"
    return api.Event(type=kind, time=when, changes=list(changes), reason=reason, flow=flow)


def test_a_plain_line() -> None:
    assert ctformat.text(of_flow(web(), NOW), SHOW) == (
        "tcp      6 431997 ESTABLISHED src=10.9.1.2 dst=10.9.2.2 sport=45044 dport=443 packets=4 bytes=221 "
        "src=10.9.2.2 dst=10.9.1.2 sport=443 dport=45044 packets=3 bytes=169 [ASSURED] mark=42 delta-time=3 use=1"
    )


def test_everything_that_a_line_can_have() -> None:
    flow = changed(zone=7, helper="ftp", labels=["web", "vpn", "9"], status=["CONFIRMED", "ASSURED"])
    show = Show(extended=True, id=True, ktimestamp=True, labels={"web": "web", "mail": "mail", "vpn": "vpn"})
    assert ctformat.text(of_flow(flow, NOW), show) == (
        "ipv4     2 tcp      6 431997 ESTABLISHED src=10.9.1.2 dst=10.9.2.2 sport=45044 dport=443 packets=4 bytes=221 "
        "[UNREPLIED] src=10.9.2.2 dst=10.9.1.2 sport=443 dport=45044 packets=3 bytes=169 [ASSURED] mark=42 zone=7 "
        "delta-time=3 [start=Sun Nov 22 16:15:02 2026] helper=ftp use=1 id=3049955548 labels=web,vpn"
    )


@pytest.mark.parametrize(
    ("protonum", "name", "ends", "expected"),
    [
        (17, "udp", {"sport": 1, "dport": 2}, "udp      17 9 src=10.9.1.2 dst=10.9.2.2 sport=1 dport=2 "),
        (47, "gre", {"srckey": 0, "dstkey": 31}, "gre      47 9 src=10.9.1.2 dst=10.9.2.2 srckey=0x0 dstkey=0x1f "),
        (33, "proto-33", {}, "dccp     33 9 src=10.9.1.2 dst=10.9.2.2 sport=0 dport=0 "),
        (50, "proto-50", {}, "unknown  50 9 src=10.9.1.2 dst=10.9.2.2 packets="),
    ],
)
def test_each_protocol_has_its_own(protonum: int, name: str, ends: dict[str, int], expected: str) -> None:
    both = api.Direction(src="10.9.1.2", dst="10.9.2.2", packets=1, bytes=28, **ends)
    flow = changed(protocol=name, protonum=protonum, state=None, timeout_seconds=9, orig=both, reply=both)
    assert ctformat.text(of_flow(flow, NOW), SHOW).startswith(expected)


def test_xml() -> None:
    assert ctformat.xml(of_flow(web(), NOW), SHOW) == (
        '<flow><meta direction="original"><layer3 protonum="2" protoname="ipv4"><src>10.9.1.2</src><dst>10.9.2.2</dst>'
        '</layer3><layer4 protonum="6" protoname="tcp"><sport>45044</sport><dport>443</dport></layer4><counters>'
        "<packets>4</packets><bytes>221</bytes></counters></meta>"
        '<meta direction="reply"><layer3 protonum="2" protoname="ipv4"><src>10.9.2.2</src><dst>10.9.1.2</dst>'
        '</layer3><layer4 protonum="6" protoname="tcp"><sport>443</sport><dport>45044</dport></layer4><counters>'
        "<packets>3</packets><bytes>169</bytes></counters></meta>"
        '<meta direction="independent"><state>ESTABLISHED</state><timeout>431997</timeout><mark>42</mark><use>1</use>'
        "<id>3049955548</id><assured/><deltatime>3</deltatime></meta></flow>"
    )


def test_everything_that_xml_can_have() -> None:
    flow = changed(zone=7, helper="ftp", labels=["web"])
    show = Show(timestamp=True, ktimestamp=True, labels={"web": "web"})
    element = ctformat.xml(of_event(event("DESTROY", flow, "DESTROY", "LABEL")), show)
    assert element.startswith('<flow type="destroy">')
    assert (
        "<mark>42</mark><labels><label>web</label></labels><zone>7</zone><id>3049955548</id><assured/>"
        "<timestamp><start>1795364102410000000</start><stop>1795364105410000000</stop></timestamp>"
        "<deltatime>3</deltatime></meta><when><hour>16</hour><min>15</min><sec>05</sec><wday>1</wday><day>22</day>"
        "<month>11</month><year>2026</year></when></flow>"
    ) in element
    assert ctformat.xml(of_flow(flow, NOW), SHOW).endswith("</meta><helper>ftp</helper></flow>")


def test_options_to_load_again() -> None:
    translated = changed(
        orig=api.Direction(src="10.9.1.2", dst="203.0.113.80", sport=43518, dport=80, packets=4, bytes=221),
        reply=api.Direction(src="10.9.2.2", dst="10.9.1.2", sport=8080, dport=43518, packets=3, bytes=169),
        mark=0,
    )
    assert ctformat.save(of_flow(translated, NOW)) == (
        "-A -t 431997 -u SEEN_REPLY,ASSURED -s 10.9.1.2 -d 203.0.113.80 -g 10.9.2.2 -q 10.9.1.2 -p tcp --sport 43518 "
        "--dport 80 --reply-port-src 8080 --reply-port-dst 43518 --state ESTABLISHED"
    )
    assert " -u SEEN_REPLY,ASSURED -m 42 -w 7 -s " in ctformat.save(of_flow(changed(zone=7), NOW))
    masqueraded = changed(
        reply=api.Direction(src="10.9.2.2", dst="10.9.2.1", sport=443, dport=45044, packets=3, bytes=169)
    )
    assert " -r 10.9.2.2 -n 10.9.2.1 " in ctformat.save(of_flow(masqueraded, NOW), "-D")
    assert ctformat.save(of_flow(ping6(), NOW)) == (
        "-A -t 28 -u UNSET -s fd09:1::2 -d fd09:2::2 -r fd09:2::2 -q fd09:1::2 -p icmpv6 --icmpv6-type 128 "
        "--icmpv6-code 0 --icmpv6-id 8626"
    )


def test_events_say_what_the_kernels_say() -> None:
    syn = changed(state="SYN_SENT", status=["CONFIRMED"], timeout_seconds=120, mark=0)
    assert ctformat.text(of_event(event("NEW", syn, "NEW")), SHOW) == (
        "    [NEW] tcp      6 120 SYN_SENT src=10.9.1.2 dst=10.9.2.2 sport=45044 dport=443 [UNREPLIED] src=10.9.2.2 "
        "dst=10.9.1.2 sport=443 dport=45044"
    )
    # Neither the state nor a mark of 0 has changed.
    assert ctformat.text(of_event(event("UPDATE", changed(mark=0), "ASSURED")), SHOW) == (
        " [UPDATE] tcp      6 431997 src=10.9.1.2 dst=10.9.2.2 sport=45044 dport=443 src=10.9.2.2 dst=10.9.1.2 "
        "sport=443 dport=45044 [ASSURED]"
    )
    assert "ESTABLISHED" in ctformat.text(of_event(event("UPDATE", web(), "PROTOINFO")), SHOW)
    assert ctformat.text(of_event(event("UPDATE", changed(mark=0), "MARK")), SHOW).endswith("[ASSURED] mark=0")
    # The time was up.
    over = changed(timeout_seconds=0, state="TIME_WAIT")
    assert ctformat.text(of_event(event("DESTROY", over, "DESTROY", reason="timeout")), Show(timestamp=True)) == (
        "[1795364105.410000]\t[DESTROY] tcp      6 TIME_WAIT src=10.9.1.2 dst=10.9.2.2 sport=45044 dport=443 packets=4 "
        "bytes=221 src=10.9.2.2 dst=10.9.1.2 sport=443 dport=45044 packets=3 bytes=169 [ASSURED] mark=42 delta-time=3"
    )
    killed = ctformat.text(of_event(event("DESTROY", web(), "DESTROY", reason="killed")), Show(ktimestamp=True))
    assert killed.endswith("delta-time=3 [start=Sun Nov 22 16:15:02 2026] [stop=Sun Nov 22 16:15:05 2026] [USERSPACE]")


@pytest.mark.parametrize(
    ("src", "sport", "changes", "expected"),
    [
        ("10.9.1.2", None, {}, (
            "296 proto=6 src=10.9.1.2 dst=10.9.2.2 sport=0 dport=50000 mask-src=255.255.255.255 "
            "mask-dst=255.255.255.255 sport=0 dport=65535 master-src=10.9.1.2 master-dst=10.9.2.2 sport=45044 "
            "dport=443 class=0 helper=ftp"
        )),
        (None, 5060, {"class_": "video", "flags": ["PERMANENT", "INACTIVE"], "zone": 3}, (
            "296 proto=6 src=0.0.0.0 dst=10.9.2.2 sport=5060 dport=50000 mask-src=0.0.0.0 mask-dst=255.255.255.255 "
            "sport=65535 dport=65535 master-src=10.9.1.2 master-dst=10.9.2.2 sport=45044 dport=443 zone=3 "
            "PERMANENT,INACTIVE class=2 helper=ftp"
        )),
        ("10.9.0.0/16", None, {}, (
            "296 proto=6 src=10.9.0.0 dst=10.9.2.2 sport=0 dport=50000 mask-src=255.255.0.0 mask-dst=255.255.255.255 "
            "sport=0 dport=65535 master-src=10.9.1.2 master-dst=10.9.2.2 sport=45044 dport=443 class=0 helper=ftp"
        )),
    ],
)  # fmt: skip
def test_expectations(src: str | None, sport: int | None, changes: dict[str, object], expected: str) -> None:
    this = api.Expectation(
        id=1, family="ipv4", protocol="tcp", protonum=6, zone=0, timeout_seconds=296, src=src, dst="10.9.2.2",
        sport=sport, dport=50000, helper="ftp", class_=None, flags=[], master=1,
    )  # fmt: skip
    assert ctformat.expectation(msgspec.structs.replace(this, **changes), web()) == expected


def test_an_expectation_of_gre_and_of_ipv6() -> None:
    this = api.Expectation(
        id=1, family="ipv6", protocol="gre", protonum=47, zone=0, timeout_seconds=9, src="fd00::1", dst="fd00::2",
        srckey=5, dstkey=6, helper="pptp", class_=None, flags=[], master=1,
    )  # fmt: skip
    ones = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    assert ctformat.expectation(this, web()).startswith(
        f"9 proto=47 src=fd00::1 dst=fd00::2 srckey=0x5 dstkey=0x6 mask-src={ones} mask-dst={ones} srckey=0xffff "
        "dstkey=0xffff master-src=10.9.1.2 "
    )


def test_the_names_of_labels(tmp_path: Path) -> None:
    file = tmp_path / "connlabel.conf"
    file.write_text("# a comment\n0 web\n 7\tmail server\n\nnonsense\n128 beyond\n3 vpn # behind\n")
    assert ctformat.read_labels(str(file)) == {0: "web", 7: "mail server", 3: "vpn"}
