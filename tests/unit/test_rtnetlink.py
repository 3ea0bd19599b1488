"""rtnetlink's messages: written by hand here, and asked of the kernel where they need no network of our own."""

import socket
import struct

from conntrackd import rtnetlink
from conntrackd.rtnetlink import IFA_BROADCAST, IFLA_IFNAME, RTM_DELLINK, RTM_NEWADDR, Message, messages, way_to

LINK = Message(RTM_DELLINK, (0, 1, 7, 0x1003, 0), {IFLA_IFNAME: b"lan\0", 99: b""})
ADDRESS = Message(RTM_NEWADDR, (2, 24, 128, 0, 7), {IFA_BROADCAST: bytes((10, 1, 0, 255))})
UNREAD = Message(68, (), {})


def written(message: Message) -> bytes:
    form = rtnetlink.BEGIN.get(message.kind, rtnetlink.NOTHING)
    body = form.pack(*message.begin) if message.begin else b"what we do not read"
    for kind, value in message.attributes.items():
        body += struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), message.kind, 0, 0, 0) + body + bytes(-len(body) % 4)


def test_several_at_once() -> None:
    all_of_them = [LINK, UNREAD, ADDRESS]
    assert list(messages(b"".join(map(written, all_of_them)))) == all_of_them


def test_what_is_cut_or_lies_about_its_length_is_left_out() -> None:
    whole = written(LINK) + written(ADDRESS)
    for length in range(len(whole)):
        assert list(messages(whole[:length])) == [LINK] * (length >= len(written(LINK)))
    for lie in (0, 15, 1 << 31):
        assert list(messages(struct.pack("=I", lie) + whole[4:])) == []
    at = 16 + rtnetlink.LINK.size  # of the first attribute
    for lie in (0, 3, 0xFFFF):
        (told,) = messages(written(LINK)[:at] + struct.pack("=H", lie) + written(LINK)[at + 2 :])
        assert told == Message(LINK.kind, LINK.begin, {})


def test_the_way_to_ourselves() -> None:
    assert way_to(socket.inet_aton("127.0.0.1")) == 0
