"""Connections, expectations and tuples in the words of the contract (api.py)."""

import time
from collections.abc import Callable
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any, Final

import msgspec

from conntrackd import api
from conntrackd.const import (
    CLOSED_NAMES,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPPROTO_UDPLITE,
    STATUS_NAMES,
)
from conntrackd.core.conn import Conn
from conntrackd.core.expect import EXPECT_FLAG_NAMES, Expect
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATE_NAMES
from conntrackd.core.proto.sctp import SctpConn
from conntrackd.core.proto.tcp_conn import (
    FLAG_BE_LIBERAL,
    FLAG_CLOSE_INIT,
    FLAG_SACK_PERM,
    FLAG_WINDOW_SCALE,
    TcpConn,
    TcpPeer,
    sides,
)
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATE_NAMES
from conntrackd.core.tuples import PROTOCOL_NAMES
from conntrackd.hooks import Firewall

TCP_FLAG_NAMES: Final = {
    FLAG_WINDOW_SCALE: "WINDOW_SCALE",
    FLAG_SACK_PERM: "SACK_PERM",
    FLAG_CLOSE_INIT: "CLOSE_INIT",
    FLAG_BE_LIBERAL: "BE_LIBERAL",
}
WITH_PORTS: Final = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP, IPPROTO_UDPLITE)


def flow(fw: Firewall, ct: Conn, now_ms: int, interface: Callable[[int], str | None]) -> api.Flow:
    """Describe a connection as it is now."""
    orig = api.Direction(**ends(ct.orig), packets=ct.packets_orig, bytes=ct.bytes_orig)
    reply = api.Direction(**ends(ct.reply), packets=ct.packets_reply, bytes=ct.bytes_reply)
    if isinstance(ct, SctpConn):
        orig.vtag, reply.vtag = ct.vtag
    return api.Flow(
        id=ct.id,
        family=family(ct.orig),
        protocol=protocol(ct.protonum),
        protonum=ct.protonum,
        zone=ct.zone,
        state=state_name(ct, ct.state),
        status=status_names(ct.status),
        timeout_seconds=max(0, (ct.expires_ms - now_ms) // 1000),
        age_seconds=(now_ms - ct.created_ms) // 1000,
        orig=orig,
        reply=reply,
        mark=ct.mark,
        helper=ct.help.helper.name if ct.help is not None else None,
        master=ct.master.id if ct.master is not None else None,
        rule=ct.rule,
        in_=interface(ct.iif),
        out=interface(ct.oif),
        labels=labels(fw, fw.net.table.labels.get(ct.id, 0)),
        idle_seconds=(now_ms - ct.seen_ms) // 1000,
    )


def details(
    fw: Firewall, ct: Conn, children: list[int], now_ms: int, interface: Callable[[int], str | None]
) -> api.FlowDetails:
    """Describe everything about a connection; `children`: those that it has announced."""
    expected = ct.help.expectations if ct.help is not None else []
    return api.FlowDetails(
        **msgspec.structs.asdict(flow(fw, ct, now_ms, interface)),
        begun=moment(ct.created_ms, now_ms),
        last_packet=moment(ct.seen_ms, now_ms),
        generation=ct.generation,
        ending=CLOSED_NAMES[ct.ending] if ct.ending else None,
        own_timeouts=ct.timeouts != 0,
        children=children,
        expected=[expectation(expect, now_ms) for expect in expected if expect.expires_ms > now_ms],
        tcp=api.TcpDetails(*map(_side, sides(ct))) if isinstance(ct, TcpConn) else msgspec.UNSET,
    )


def _side(peer: TcpPeer) -> api.TcpSide:
    return api.TcpSide(
        end=peer.end,
        max_end=peer.maxend,
        max_window=peer.maxwin,
        scale=peer.scale,
        flags=[name for bit, name in TCP_FLAG_NAMES.items() if peer.flags & bit],
    )


def expectation(expect: Expect, now_ms: int) -> api.Expectation:
    """Describe a connection that is expected."""
    info = expect.master.help
    assert info is not None
    parts = ends(expect.tuple)
    size = len(expect.tuple) - 5 >> 1
    prefix = int.from_bytes(expect.mask[1 : 1 + size], "big").bit_count()
    if prefix == 0:
        parts["src"] = None
    elif prefix < size * 8:
        parts["src"] = str(ip_network(f"{parts['src']}/{prefix}", strict=False))
    if "sport" in parts and expect.mask[-4:-2] == b"\0\0":
        parts["sport"] = None
    return api.Expectation(
        id=expect.id,
        family=family(expect.tuple),
        protocol=protocol(expect.tuple[0]),
        protonum=expect.tuple[0],
        zone=expect.master.zone,
        timeout_seconds=max(0, (expect.expires_ms - now_ms) // 1000),
        **parts,
        helper=info.helper.name,
        class_=info.helper.policies[expect.expect_class].name or None,
        flags=[name for bit, name in EXPECT_FLAG_NAMES.items() if expect.flags & bit],
        master=expect.master.id,
    )


def labels(fw: Firewall, bits: int) -> list[str] | msgspec.UnsetType:
    """Name labels as the policy in force does; UNSET: there are none."""
    return fw.ruleset.label_names(bits) if bits else msgspec.UNSET


def state_name(ct: Conn, state: int) -> str | None:
    """Name the state of a connection; None where its protocol has none."""
    if ct.protonum == IPPROTO_TCP:
        return TCP_STATE_NAMES[state]
    return SCTP_STATE_NAMES[state] if ct.protonum == IPPROTO_SCTP else None


def status_names(status: int) -> list[str]:
    """Name the bits of a status."""
    return [name for bit, name in STATUS_NAMES.items() if status & bit]


def family(key: bytes) -> str:
    """Name the family of a tuple."""
    return "ipv4" if len(key) == 13 else "ipv6"


def protocol(protonum: int) -> str:
    """Name a protocol."""
    return PROTOCOL_NAMES.get(protonum, f"proto-{protonum}")


def ends(key: bytes) -> dict[str, Any]:
    """Spell a tuple out: the addresses, and what its protocol has besides, by the names of api.Direction."""
    family, size = (AF_INET, 4) if len(key) == 13 else (AF_INET6, 16)
    ends: dict[str, Any] = {
        "src": inet_ntop(family, key[1 : 1 + size]),
        "dst": inet_ntop(family, key[1 + size : 1 + 2 * size]),
    }
    protonum = key[0]
    first, second = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
    if protonum in WITH_PORTS:
        return ends | {"sport": first, "dport": second}
    if protonum in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        return ends | {"type": key[-2], "code": key[-1], "id": first}
    if protonum == IPPROTO_GRE:
        return ends | {"srckey": first, "dstkey": second}
    return ends


def moment(at_ms: int, now_ms: int) -> str:
    """Write a time of the monotonic clock as one of the wall clock, which may have been set since then."""
    return api.timestamp(time.time() - (now_ms - at_ms) / 1000)
