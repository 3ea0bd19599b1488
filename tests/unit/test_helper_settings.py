"""The settings of helpers: what they open for a third party, and for whom, only where the operator says so."""

import pytest

from conntrackd.const import IPPROTO_TCP, IPPROTO_UDP, NF_ACCEPT
from conntrackd.core.expect import Expect
from conntrackd.core.helper import Message
from conntrackd.core.helpers.ftp import FtpHelp
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import destination, source
from tests.fuzz.helpers import START_MS, connection

CLIENT = bytes((10, 0, 0, 1))
SERVER = bytes((10, 0, 0, 255))
THIRD = bytes((203, 0, 113, 9))
ANYBODY = bytes(4)

CALL = b"INVITE sip:b SIP/2.0\r\nCSeq: 1 INVITE\r\n\r\nv=0\r\nc=IN IP4 %s\r\nm=audio 5000 RTP/AVP 0\r\n"
REGISTRATION = b"REGISTER sip:r SIP/2.0\r\nCSeq: 1 REGISTER\r\nExpires: 60\r\nContact: <sip:u@10.0.0.1:6000>\r\n\r\n"


def heard(helper: str, protonum: int, port: int, payload: bytes, setting: str, value: int) -> list[Expect]:
    """What is expected after the client has said something."""
    sysctl = Sysctl()
    assert hasattr(sysctl, setting)
    setattr(sysctl, setting, value)
    net = Conntrack(sysctl)
    ct = connection(net, helper, protonum, port, False)
    assert ct.help is not None
    if isinstance(ct.help, FtpHelp):
        ct.help.client_lines.append(1000)
    assert ct.help.helper.help(net, ct, Message(payload, 0, 1000, False), START_MS) == NF_ACCEPT
    return list(net.table.expectations.by_id.values())


@pytest.mark.parametrize("line", [b"PORT 203,0,113,9,20,1\r\n", b"EPRT |1|203.0.113.9|5121|\r\n"])
def test_ftp_loose(line: bytes) -> None:
    assert heard("ftp", IPPROTO_TCP, 21, line, "ftp_loose", 0) == []
    (expect,) = heard("ftp", IPPROTO_TCP, 21, line, "ftp_loose", 1)
    assert (source(expect.tuple), destination(expect.tuple), expect.tuple[-2:]) == (SERVER, THIRD, b"\x14\x01")


def test_sip_direct_media() -> None:
    """Directly, media go between the two ends of the signalling, and to the speaker's own address."""
    assert heard("sip", IPPROTO_UDP, 5060, CALL % b"203.0.113.9", "sip_direct_media", 1) == []
    direct = heard("sip", IPPROTO_UDP, 5060, CALL % b"10.0.0.1", "sip_direct_media", 1)
    assert {(source(each.tuple), destination(each.tuple)) for each in direct} == {(SERVER, CLIENT)}
    open_to_all = heard("sip", IPPROTO_UDP, 5060, CALL % b"203.0.113.9", "sip_direct_media", 0)
    assert {(source(each.mask), destination(each.tuple)) for each in open_to_all} == {(ANYBODY, THIRD)}
    assert len(direct) == len(open_to_all) == 2  # RTP and RTCP


def test_sip_direct_signalling() -> None:
    (expect,) = heard("sip", IPPROTO_UDP, 5060, REGISTRATION, "sip_direct_signalling", 1)
    assert (source(expect.tuple), source(expect.mask)) == (SERVER, b"\xff" * 4)
    (expect,) = heard("sip", IPPROTO_UDP, 5060, REGISTRATION, "sip_direct_signalling", 0)
    assert source(expect.mask) == ANYBODY
    assert destination(expect.tuple) == CLIENT
