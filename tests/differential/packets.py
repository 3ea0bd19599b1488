"""Raw packets: crafted with struct because thousands are needed per second, and described for people.

Every builder takes what a header holds and computes the rest; what is given explicitly is put in as it is, however
wrong. Checksums are finished unless `bad` is set, which breaks them.
"""

import itertools
import socket
import struct
from collections.abc import Sequence
from functools import cache
from ipaddress import ip_address
from typing import Final

ROUTER_ADDRESSES: Final = ("192.0.2.1/32", "2001:db8::1/128")  # the router's own, for packets that end there

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

HOP_BY_HOP, ROUTING, FRAGMENT, ESP, AUTH, NO_NEXT, DEST_OPTS, MOBILITY = 0, 43, 44, 50, 51, 59, 60, 135


def checksum(data: bytes) -> int:
    """The Internet checksum [RFC 1071] by the remainder: 2**16 is 1 modulo 0xffff."""
    if len(data) & 1:
        data += b"\0"
    return (0xFFFF - int.from_bytes(data, "big") % 0xFFFF) % 0xFFFF


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C: Final = _crc32c_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


# --- layer 3 ----------------------------------------------------------------------------------------------------


def ipv4(
    saddr: bytes,
    daddr: bytes,
    proto: int,
    payload: bytes,
    *,
    ttl: int = 64,
    ident: int = 0,
    fragment: int = 0x4000,
    options: bytes = b"",
    length: int | None = None,
    words: int | None = None,
    bad: bool = False,
) -> bytes:
    """One IPv4 packet; `fragment` is the whole flags and offset field (default: DF)."""
    options += bytes(-len(options) % 4)
    words = 5 + len(options) // 4 if words is None else words
    length = 20 + len(options) + len(payload) if length is None else length
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x40 | words & 15, 0, length & 0xFFFF, ident, fragment, ttl, proto, 0, saddr, daddr
    )
    value = checksum((head + options)[: words * 4]) ^ (0x0101 if bad else 0)
    return head[:10] + value.to_bytes(2, "big") + head[12:] + options + payload


def ipv6(
    saddr: bytes,
    daddr: bytes,
    proto: int,
    payload: bytes,
    *,
    hop_limit: int = 64,
    length: int | None = None,
) -> bytes:
    length = len(payload) if length is None else length
    return struct.pack(">IHBB16s16s", 0x60000000, length & 0xFFFF, proto, hop_limit, saddr, daddr) + payload


def extended(headers: Sequence[tuple[int, bytes]], proto: int, payload: bytes) -> tuple[int, bytes]:
    """A chain of IPv6 extension headers before a payload: (first protocol, bytes). Bodies lack their first byte."""
    for kind, body in reversed(headers):
        payload = bytes([proto]) + body + payload
        proto = kind
    return proto, payload


def ip(saddr: bytes, daddr: bytes, proto: int, payload: bytes, ttl: int = 64, ident: int = 0) -> bytes:
    if len(saddr) == 4:
        return ipv4(saddr, daddr, proto, payload, ttl=ttl, ident=ident)
    return ipv6(saddr, daddr, proto, payload, hop_limit=ttl)


def fragments(packet: bytes, cuts: Sequence[int], ident: int) -> list[bytes]:
    """The packet cut at offsets of its payload, each a multiple of 8."""
    pieces = []
    header = 20 if packet[0] >> 4 == 4 else 40
    payload = packet[header:]
    edges = [0, *cuts, len(payload)]
    for start, end in itertools.pairwise(edges):
        more = end < len(payload)
        if header == 20:
            field = start >> 3 | (0x2000 if more else 0)
            pieces.append(
                ipv4(packet[12:16], packet[16:20], packet[9], payload[start:end], ident=ident & 0xFFFF, fragment=field)
            )
        else:
            pieces.append(ipv6_fragment(packet, payload[start:end], start, more, ident))
    return pieces


def ipv6_fragment(packet: bytes, payload: bytes, offset: int, more: bool, ident: int) -> bytes:
    head = struct.pack(">BBHI", packet[6], 0, offset | more, ident)
    return ipv6(packet[8:24], packet[24:40], FRAGMENT, head + payload, hop_limit=packet[7])


# --- layer 4 ----------------------------------------------------------------------------------------------------


def _sealed(
    saddr: bytes,
    daddr: bytes,
    proto: int,
    segment: bytes,
    at: int,
    bad: bool,
    covered: int | None = None,
    length: int | None = None,
) -> bytes:
    """A segment with its checksum over the pseudo header put in at an offset."""
    pseudo = saddr + daddr + struct.pack(">HH", proto, len(segment) if length is None else length)
    value = checksum(pseudo + segment[:covered])
    if bad:
        value ^= 0x1001
    elif value == 0 and proto != socket.IPPROTO_TCP:
        value = 0xFFFF
    return segment[:at] + value.to_bytes(2, "big") + segment[at + 2 :]


def tcp(
    saddr: bytes,
    daddr: bytes,
    sport: int,
    dport: int,
    flags: int,
    seq: int,
    ack: int,
    window: int,
    options: bytes = b"",
    payload: bytes = b"",
    *,
    words: int | None = None,
    bad: bool = False,
) -> bytes:
    options += bytes(-len(options) % 4)
    words = 5 + len(options) // 4 if words is None else words
    segment = (
        struct.pack(
            ">HHIIBBHHH", sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, words << 4 & 0xF0, flags, window, 0, 0
        )
        + options
        + payload
    )
    return _sealed(saddr, daddr, 6, segment, 16, bad)


def udp(
    saddr: bytes,
    daddr: bytes,
    sport: int,
    dport: int,
    payload: bytes = b"",
    *,
    length: int | None = None,
    zero: bool = False,
    bad: bool = False,
) -> bytes:
    length = 8 + len(payload) if length is None else length
    segment = struct.pack(">HHHH", sport, dport, length & 0xFFFF, 0) + payload
    if zero:
        return segment
    if 8 <= length < len(segment):  # the kernel sums what the length field says
        return _sealed(saddr, daddr, 17, segment[:length], 6, bad) + segment[length:]
    return _sealed(saddr, daddr, 17, segment, 6, bad)


def udplite(
    saddr: bytes,
    daddr: bytes,
    sport: int,
    dport: int,
    payload: bytes = b"",
    *,
    coverage: int = 0,
    zero: bool = False,
    bad: bool = False,
    rfc: bool = False,
) -> bytes:
    """UDPLite as the kernel's tracker verifies it, which no sender makes; `rfc`: as RFC 3828 has it.

    The tracker puts UDP's number into the pseudo header and, over IPv4, only the low byte of the length.
    """
    segment = struct.pack(">HHHH", sport, dport, coverage, 0) + payload
    if zero:
        return segment
    proto = 136 if rfc else 17
    length = len(segment) if rfc or len(saddr) == 16 else len(segment) & 0xFF
    return _sealed(saddr, daddr, proto, segment, 6, bad, coverage or len(segment), length)


def icmp(kind: int, code: int, rest: bytes, *, bad: bool = False) -> bytes:
    segment = bytes([kind, code, 0, 0]) + rest
    value = checksum(segment) ^ (0x1001 if bad else 0)
    return segment[:2] + value.to_bytes(2, "big") + segment[4:]


def icmpv6(saddr: bytes, daddr: bytes, kind: int, code: int, rest: bytes, *, bad: bool = False) -> bytes:
    return _sealed(saddr, daddr, 58, bytes([kind, code, 0, 0]) + rest, 2, bad)


def sctp(sport: int, dport: int, vtag: int, chunks: Sequence[bytes], *, bad: bool = False) -> bytes:
    packet = struct.pack(">HHII", sport, dport, vtag, 0) + b"".join(chunks)
    return packet[:8] + struct.pack("<I", crc32c(packet) ^ bad) + packet[12:]


def chunk(kind: int, flags: int = 0, value: bytes = b"", length: int | None = None) -> bytes:
    return (
        struct.pack(">BBH", kind, flags, 4 + len(value) if length is None else length) + value + bytes(-len(value) % 4)
    )


# --- for people -------------------------------------------------------------------------------------------------

_TCP_FLAGS: Final = "FSRPAUEW"
_SCTP_CHUNKS: Final = (
    *("DATA", "INIT", "INIT_ACK", "SACK", "HEARTBEAT", "HEARTBEAT_ACK", "ABORT", "SHUTDOWN", "SHUTDOWN_ACK", "ERROR"),
    *("COOKIE_ECHO", "COOKIE_ACK", "ECNE", "CWR", "SHUTDOWN_COMPLETE"),
)
_HEADERS: Final = {0: "hop-by-hop", 43: "routing", 60: "dest-opts", 135: "mobility"}


@cache
def _address(raw: bytes) -> str:
    return str(ip_address(raw))


def describe(packet: bytes) -> str:
    """One line about a packet, in the manner of tcpdump."""
    try:
        return _describe(packet)
    except (struct.error, IndexError, ValueError):
        return f"broken: {packet[:64].hex()}"


def _describe(packet: bytes) -> str:
    version = packet[0] >> 4
    if version == 4:
        header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        proto, ttl = packet[9], packet[8]
        saddr, daddr = _address(packet[12:16]), _address(packet[16:20])
        field = int.from_bytes(packet[6:8], "big")
        notes = [f"ttl {ttl}"] if ttl < 2 else []
        if header != 20:
            notes.append(f"IP header {header} [{packet[20:header].hex()}]")
        if checksum(packet[:header]):
            notes.append("bad IP checksum")
        if total != len(packet):
            notes.append(f"IP length {total} of {len(packet)}")
        if field & 0x3FFF:
            notes.append(f"frag id {packet[4:6].hex()} {(field & 0x1FFF) * 8}{'+' if field & 0x2000 else ''}")
        at, first = header, not field & 0x1FFF
    elif version == 6:
        proto, at, first = packet[6], 40, True
        saddr, daddr = _address(packet[8:24]), _address(packet[24:40])
        notes = [f"hlim {packet[7]}"] if packet[7] not in (64,) else []
        total = int.from_bytes(packet[4:6], "big") + 40
        if total != len(packet):
            notes.append(f"IP length {total} of {len(packet)}")
        while proto in _HEADERS or proto in (FRAGMENT, AUTH):
            if proto == FRAGMENT:
                field = int.from_bytes(packet[at + 2 : at + 4], "big")
                ident = packet[at + 4 : at + 8].hex()
                notes.append(f"frag id {ident} {field & 0xFFF8}{'+' if field & 1 else ''}")
                first, size = not field & 0xFFF8, 8
            elif proto == AUTH:
                notes.append("AH")
                size = (packet[at + 1] + 2) * 4
            else:
                notes.append(_HEADERS[proto])
                size = (packet[at + 1] + 1) * 8
            proto, at = packet[at], at + size
            if not first:
                break
    else:
        raise ValueError(version)
    rest = packet[at:]
    if not first or len(rest) < 4:
        text = f"{saddr} > {daddr} proto {proto} [{len(rest)} bytes {rest[:16].hex()}]"
    elif proto in (6, 17, 132, 136):
        sport, dport = struct.unpack_from(">HH", rest)
        text = f"{saddr}.{sport} > {daddr}.{dport} {_layer4(proto, packet[12:20], rest, version, packet)}"
    else:
        text = f"{saddr} > {daddr} {_layer4(proto, packet[12:20], rest, version, packet)}"
    return f"{text}{' (' + ', '.join(notes) + ')' if notes else ''}"


def _layer4(proto: int, addresses: bytes, rest: bytes, version: int, packet: bytes) -> str:
    pseudo = (addresses if version == 4 else packet[8:40]) + struct.pack(">HH", proto, len(rest))
    if proto == 6:
        seq, ack, offset, flags, window = struct.unpack_from(">IIBBH", rest, 4)
        header = (offset >> 4) * 4
        names = "".join(name for bit, name in enumerate(_TCP_FLAGS) if flags >> bit & 1) or "none"
        text = f"tcp {names} seq {seq} ack {ack} win {window} len {len(rest) - header}"
        options = f" options {rest[20:header].hex()}" if header > 20 else ""
        return text + options + (" bad checksum" if checksum(pseudo + rest) else "")
    if proto == 17:
        length, value = struct.unpack_from(">HH", rest, 4)
        return f"udp length {length} of {len(rest)} checksum {value:04x}{_sum(pseudo, rest, value)}"
    if proto == 136:
        coverage, value = struct.unpack_from(">HH", rest, 4)
        return f"udplite coverage {coverage} of {len(rest)} checksum {value:04x}"
    if proto == 132:
        vtag, chunks, at = rest[4:8].hex(), [], 12
        while at + 4 <= len(rest):
            kind, flags, length = struct.unpack_from(">BBH", rest, at)
            name = _SCTP_CHUNKS[kind] if kind < len(_SCTP_CHUNKS) else str(kind)
            tag = f" tag {rest[at + 4 : at + 8].hex()}" if kind in (1, 2) else ""
            chunks.append(f"{name}{f'/{flags}' if flags else ''}({length}{tag})")
            at += max(length + 3 & ~3, 4)
        good = crc32c(rest[:8] + bytes(4) + rest[12:]) == int.from_bytes(rest[8:12], "little")
        return f"sctp vtag {vtag} {' '.join(chunks)}{'' if good else ' bad checksum'}"
    if proto in (1, 58):
        kind, code = rest[0], rest[1]
        bad = checksum(rest if proto == 1 else pseudo + rest)
        error = kind in (3, 4, 5, 11, 12) if proto == 1 else kind < 128
        inner = f" about [{describe(rest[8:])}]" if error and len(rest) > 8 else f" id {rest[4:6].hex()}"
        name = "icmp" if proto == 1 else "icmpv6"
        return f"{name} type {kind} code {code}{inner} len {len(rest)}{' bad checksum' if bad else ''}"
    if proto == 47:
        return f"gre {rest[:12].hex()} len {len(rest)}"
    return f"proto {proto} len {len(rest)} {rest[:16].hex()}"


def _sum(pseudo: bytes, rest: bytes, value: int) -> str:
    return " bad checksum" if value and checksum(pseudo + rest) else ""
