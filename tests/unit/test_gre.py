import pytest

from conntrackd.const import (
    INVALID_GRE_VERSION,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPS_ASSURED,
)
from tests.unit.craft import Talk, gre, ip

PPP = 0x880B


def test_version_0_is_one_flow_per_pair_of_addresses() -> None:
    talk = Talk()
    assert talk.send(gre(0, 0x0800, b"\0\0\0\1")) == IP_CT_NEW
    assert talk.send(gre(0, 0x86DD, b"\0\0\0\2", back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.net.table.count == 1


def test_flow_is_assured_with_the_second_answer() -> None:
    talk = Talk()
    talk.send(gre())
    talk.send(gre(back=True))
    assert talk.timeout() == 30
    assert not talk.status(IPS_ASSURED)
    talk.send(gre(back=True))
    assert talk.timeout() == 180
    assert talk.status(IPS_ASSURED)


def test_timeouts_are_settings() -> None:
    talk = Talk(gre_timeout=7_000, gre_timeout_stream=9_000)
    talk.send(gre())
    assert talk.timeout() == 7
    talk.send(gre(back=True))
    talk.send(gre())
    assert talk.timeout() == 9


def test_version_1_is_one_flow_per_call_id() -> None:
    talk = Talk()
    assert talk.send(gre(1, PPP, b"\0\0\0\1")) == IP_CT_NEW
    assert talk.send(gre(1, PPP, b"\0\0\0\2")) == IP_CT_NEW
    assert talk.net.table.count == 2


def test_version_1_that_carries_no_ppp_is_invalid() -> None:
    assert Talk().send(gre(1, 0x0800, bytes(4))) == INVALID_GRE_VERSION


@pytest.mark.parametrize("size", range(4))
def test_truncated_header_is_taken_for_version_0(size: int) -> None:
    talk = Talk()
    talk.send(gre())
    assert talk.send(ip(47, bytes(size), back=True)) == IP_CT_ESTABLISHED_REPLY
