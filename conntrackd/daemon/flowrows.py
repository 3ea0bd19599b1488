"""Connections and tuples in the words of the contract (api.py)."""

import time
from collections.abc import Callable
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any, Final

import msgspec

from conntrackd import api
from conntrackd.const import (
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
from conntrackd.core.net import Conntrack
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATE_NAMES
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATE_NAMES
from conntrackd.core.tuples import PROTOCOL_NAMES

WITH_PORTS: Final = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP, IPPROTO_UDPLITE)


def flow(net: Conntrack, ct: Conn, now_ms: int, interface: Callable[[int], str | None]) -> api.Flow:
    """Describe a connection as it is now."""
    labels = net.table.labels.get(ct.id, 0)
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
        orig=api.Direction(**ends(ct.orig), packets=ct.packets_orig, bytes=ct.bytes_orig),
        reply=api.Direction(**ends(ct.reply), packets=ct.packets_reply, bytes=ct.bytes_reply),
        mark=ct.mark,
        helper=ct.help.helper.name if ct.help is not None else None,
        master=ct.master.id if ct.master is not None else None,
        rule=ct.rule,
        in_=interface(ct.iif),
        out=interface(ct.oif),
        labels=f"{labels:032x}" if labels else msgspec.UNSET,
        idle_seconds=(now_ms - ct.seen_ms) // 1000,
    )


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
