"""What each helper makes of text: the differential tests compare it with the kernel's, here are the shapes."""

import pytest

from conntrackd.core.helpers.amanda import announced_ports
from conntrackd.core.helpers.ftp import PARTIAL, announcement, remember_line
from conntrackd.core.helpers.irc import read_offer
from conntrackd.core.helpers.sip import Contact, connection_address, header, message_length, parameter_number, read_cseq
from conntrackd.core.helpers.text import ipv4_at, ipv6_at, number_at

KEY4 = bytes((6, 10, 0, 0, 5, 10, 0, 0, 80, 1, 2, 0, 21))
KEY6 = b"\x06" + bytes(15) + b"\x05" + bytes(15) + b"\x50" + KEY4[-4:]
ADDRESS = bytes((10, 0, 0, 5))


@pytest.mark.parametrize(
    ("line", "reply", "expected"),
    [
        (b"PORT 10,0,0,5,4,1\r\n", False, (1, ADDRESS, 1025)),
        (b"port 10,0,0,5,4,1\r\n", False, (1, ADDRESS, 1025)),
        (b"EPRT |1|10.0.0.5|1025|\r\n", False, (1, ADDRESS, 1025)),
        (b"EPRT |2|::5|1025|\r\n", False, (PARTIAL, b"", 0)),
        (b"227 Entering Passive Mode (10,0,0,5,4,1).\r\n", True, (1, ADDRESS, 1025)),
        (b"227 =10,0,0,5,4,1 \r\n", True, (1, ADDRESS, 1025)),
        (b"229 Extended (|||1025|)\r\n", True, (1, ADDRESS, 1025)),
        (b"229 Extended (||1025|)\r\n", True, (PARTIAL, b"", 0)),
        (b"PORT 10,0,0,5,4", False, (PARTIAL, b"", 0)),
        (b"PO", False, (PARTIAL, b"", 0)),
        (b"PORT", False, (PARTIAL, b"", 0)),
        (b"NOOP\r\n", False, (0, b"", 0)),
        (b"PORT 10,0,0,5,4,1\r\n", True, (0, b"", 0)),
    ],
)
def test_ftp(line: bytes, reply: bool, expected: tuple[int, bytes, int]) -> None:
    assert announcement(line, KEY4, reply) == expected


def test_ftp_over_ipv6() -> None:
    assert announcement(b"EPRT |2|::5|1025|\r\n", KEY6, False) == (1, bytes(15) + b"\x05", 1025)
    assert announcement(b"229 (|||7|)\r\n", KEY6, True) == (1, KEY6[1:17], 7)


def test_ftp_remembers_two_beginnings_of_lines() -> None:
    lines: list[int] = []
    for seq in (0xFFFFFFF0, 5, 0xFFFFFFF0, 10):
        remember_line(lines, seq)
    assert sorted(lines) == [5, 10]
    remember_line(lines, 1)  # an old retransmission
    assert sorted(lines) == [5, 10]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"PRIVMSG friend :\1DCC SEND file 167772165 1025\1\r\n", (ADDRESS, 1025)),
        (b"\r\nPRIVMSG friend :\1DCC CHAT chat 167772165 1025\1\r\n", (ADDRESS, 1025)),
        (b"PRIVMSG friend :see \1DCC SEND file 167772165 1025\1\r\n", (b"", 0)),
        (b"NOTICE friend :\1DCC SEND file 167772165 1025\1\r\n", (b"", 0)),
        (b"PRIVMSG friend :\1DCC SEND file 167772165 1025\1", (b"", 0)),
    ],
)
def test_irc(text: bytes, found: tuple[bytes, int]) -> None:
    assert read_offer(text) == found


def test_amanda() -> None:
    text = b"Amanda 2.6 REP\nCONNECT DATA 1025 MESG 1026 INDEX 1027\nOPTIONS STATE 5;\n"
    assert announced_ports(text) == [1025, 1026, 1027]
    assert announced_ports(text.replace(b"1026", b"0")) == [1025]
    assert announced_ports(text[:60].replace(b"\nOPT", b"")) == []


REGISTER = (
    b"REGISTER sip:registrar SIP/2.0\r\nCSeq: 7 REGISTER\r\n"
    b"m: <sip:me@phone.example>, <sip:me@10.0.0.9>\r\n"
    b'Contact: "Me, myself" <sip:me@10.0.0.5:5070;transport=udp>;expires=60, <sip:me@phone.example>,\r\n'
    b"  sip:10.0.0.6\r\nContact : <sip:me@10.0.0.7:80>\r\nContent-Length: 3\r\n\r\nabc"
)


def test_sip_headers() -> None:
    assert read_cseq(REGISTER) == (7, REGISTER.index(b"7 REG") + 1)
    at, end = header(REGISTER, b"contact", b"m", 0)
    assert REGISTER[at:].startswith(b"<sip:me@phone")
    at, end = header(REGISTER, b"contact", b"m", at)
    assert REGISTER[at:].startswith(b'"Me')
    assert REGISTER[:end].endswith(b"sip:10.0.0.6")
    assert header(REGISTER, b"expires", b"", 0) == (-1, 0)
    assert message_length(REGISTER + b"next", 0) == len(REGISTER)
    assert message_length(REGISTER[:-10], 0) == 0


def test_sip_contacts_that_are_written_out() -> None:
    """A header whose first address is a name is passed over, as in the kernel."""
    contact = Contact(REGISTER, False)
    assert contact.read_next()
    assert (contact.address, contact.port) == (ADDRESS, 5070)
    assert parameter_number(REGISTER, contact.end, b"expires=", 5) == 60
    assert contact.read_next()
    assert (contact.address, contact.port) == (bytes((10, 0, 0, 6)), 5060)
    assert parameter_number(REGISTER, contact.end, b"expires=", 5) == 5
    assert not contact.read_next()  # nobody may be called on port 80


def test_sip_description() -> None:
    text = b"v=0\r\nm=audio 1 RTP\r\nc=IN IP4 10.0.0.5\r\nm=video 2 RTP\r\nc=IN IP4 10.0.0.6\r\n"
    assert connection_address(text, 0, False) == b""
    assert connection_address(text, text.index(b"audio"), False) == ADDRESS
    assert connection_address(text, text.index(b"audio"), True) == b""


@pytest.mark.parametrize("at", [0, 3, 100])
def test_readers_take_any_offset(at: int) -> None:
    assert number_at(b"12x", at)[1] >= at
    assert ipv4_at(b"12x", at)[0] == b""
    assert ipv6_at(b"12x", at)[0] == b""


def test_readers() -> None:
    assert number_at(b"x18446744073709551617 ", 1) == (1, 21)
    assert ipv4_at(b"10.0.0.5:7", 0) == (ADDRESS, 8)
    assert ipv4_at(b"10.0.0.256", 0)[0] == b""
    assert ipv4_at(b"10.0..5", 0)[0] == b""
    assert ipv6_at(b"2001:db8::1]", 0) == (bytes.fromhex("20010db8" + "0" * 23 + "1"), 11)
    assert ipv6_at(b"::1%eth0", 0) == (bytes(15) + b"\x01", 3)
