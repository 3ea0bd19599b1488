"""Helpers [nf_conntrack_helper.c]: what reads a connection's payload to learn which connections will follow from it.

A helper is assigned to a connection by the rule that admits it, never by its port alone, and sees each of the
connection's packets once. It is one file in helpers/: a class with a name, the protocols it speaks, a policy for each
class of connections that it may expect, and `help` (docs/helpers.md has a worked example).

What a helper reads comes from whoever wants to be let through: it never looks behind what was captured, never raises,
and opens nothing but what its policies allow.
"""

from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from conntrackd.const import (
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPS_EXPECTED,
    IPS_HELPER,
    NF_ACCEPT,
)
from conntrackd.core.expect import Expect
from conntrackd.wire.fields import u32
from conntrackd.wire.ip import packet_length, transport

if TYPE_CHECKING:
    from conntrackd.core.conn import Conn
    from conntrackd.core.net import Conntrack
    from conntrackd.core.table import Table

TCP_HEADER: Final = 20
UDP_HEADER: Final = 8


class Policy:
    """What a helper may expect of one class [struct nf_conntrack_expect_policy]."""

    def __init__(self, name: str, max_expected: int, timeout_ms: int) -> None:
        self.name = name  # of the class, for people
        self.max_expected = max_expected  # at a time and per master
        self.timeout_ms = timeout_ms


class Message:
    """The payload of one packet, as a helper sees it."""

    def __init__(self, payload: bytes, missing: int, seq: int, reply: bool) -> None:
        self.payload = payload
        self.missing = missing  # bytes of the payload behind it that were not captured
        self.seq = seq  # TCP: sequence number of its first byte
        self.reply = reply  # from the side that did not open the connection


class Help:
    """What a connection with a helper keeps for it [struct nf_conn_help]; helpers that remember more extend it."""

    def __init__(self, helper: "Helper") -> None:
        self.helper = helper
        self.expectations: list[Expect] = []  # the oldest first

    def freeze(self) -> bytes:
        """Write what it remembers, besides its expectations."""
        return b""

    def thaw(self, kept: bytes) -> bool:
        """Remember what `freeze` wrote; False if it is not that. `kept` is input."""
        return not kept


@mypyc_attr(allow_interpreted_subclasses=True)
class Helper:
    """The interface of helpers. An instance is shared by all connections and keeps nothing about one."""

    def __init__(self, name: str, protocols: tuple[int, ...], policies: list[Policy], ipv6: bool = True) -> None:
        self.name = name
        self.protocols = protocols
        self.policies = policies
        self.ipv6 = ipv6  # whether it knows IPv6, besides IPv4

    def new_help(self) -> Help:
        """Make what a connection keeps for this helper."""
        return Help(self)

    def help(self, net: "Conntrack", ct: "Conn", message: Message, now_ms: int) -> int:
        """Read one message of a connection, and expect what it announces; returns NF_ACCEPT or NF_DROP."""
        raise NotImplementedError

    def expected(self, table: "Table", ct: "Conn", expect: Expect, now_ms: int) -> None:
        """Prepare a connection that fulfils an expectation of this helper [expectfn]."""

    def restored(self, table: "Table", ct: "Conn") -> None:
        """Enter what a connection with this helper keeps outside of it: it was there before a restart."""

    def destroy(self, table: "Table", ct: "Conn", now_ms: int) -> None:
        """Clean up after a connection with this helper, which has just left the table."""


def assign_helper(ct: "Conn", helper: Helper) -> None:
    """Give a new connection the helper of its rule, if it speaks that protocol [__nf_ct_try_assign_helper].

    An expected connection has the helper that its expectation says, or none.
    """
    if ct.help is not None or ct.status & IPS_EXPECTED or ct.protonum not in helper.protocols:
        return
    if len(ct.orig) == 13 or helper.ipv6:
        ct.help = helper.new_help()
        ct.status |= IPS_HELPER


def help_packet(net: "Conntrack", ct: "Conn", data: bytes, dataoff: int, length: int, ctinfo: int, now_ms: int) -> int:
    """Show an accepted packet to the connection's helper [nf_ct_helper]; returns NF_ACCEPT or NF_DROP."""
    info = ct.help
    assert info is not None
    seq = 0
    if ct.protonum == IPPROTO_TCP:
        # Who has only sent a SYN may have lied about where from.
        if ctinfo != IP_CT_ESTABLISHED and ctinfo != IP_CT_ESTABLISHED_REPLY:
            return NF_ACCEPT
        if len(data) < dataoff + TCP_HEADER:
            return NF_ACCEPT
        seq = u32(data, dataoff + 4)
        start = dataoff + (data[dataoff + 12] >> 4 << 2)
        if start >= length:
            return NF_ACCEPT
    else:
        assert ct.protonum == IPPROTO_UDP
        start = dataoff + UDP_HEADER
    payload = data[start:length]
    message = Message(payload, max(0, length - start) - len(payload), seq, ctinfo == IP_CT_ESTABLISHED_REPLY)
    return info.helper.help(net, ct, message, now_ms)


def help_new_packet(net: "Conntrack", ct: "Conn", data: bytes, reply: bool, now_ms: int) -> int:
    """Do what help_packet does at the last hook, for a packet that was tracked at the first and has to be read anew."""
    dataoff, _ = transport(data, 0)
    length = packet_length(data)
    ctinfo = IP_CT_ESTABLISHED_REPLY if reply else IP_CT_NEW
    return help_packet(net, ct, data[:length], dataoff, length, ctinfo, now_ms)
