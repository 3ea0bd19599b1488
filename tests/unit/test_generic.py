import pytest

from conntrackd.const import IP_CT_ESTABLISHED, IP_CT_ESTABLISHED_REPLY, IP_CT_NEW, IPS_ASSURED
from tests.unit.craft import Talk, ip


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protonum", [4, 33, 50, 255])
def test_addresses_are_the_connection(family: int, protonum: int) -> None:
    talk = Talk()
    assert talk.send(ip(protonum, b"one", family=family)) == IP_CT_NEW
    assert talk.send(ip(protonum, b"", family=family, back=True)) == IP_CT_ESTABLISHED_REPLY
    assert talk.send(ip(protonum, b"other", family=family)) == IP_CT_ESTABLISHED
    assert talk.timeout() == 600
    assert not talk.status(IPS_ASSURED)


def test_protocols_do_not_meet() -> None:
    talk = Talk()
    talk.send(ip(50, b""))
    assert talk.send(ip(33, b"")) == IP_CT_NEW
    assert talk.net.table.count == 2


def test_timeout_is_a_setting_and_every_packet_renews_it() -> None:
    talk = Talk(generic_timeout=5_000)
    talk.send(ip(50, b""))
    talk.wait(2)
    talk.send(ip(50, b"", back=True))
    assert talk.timeout() == 5
