"""Numbers and addresses in the text of protocols. Every function takes any bytes and any offset, and never raises."""

from ipaddress import IPv6Address
from typing import Final

ULONG: Final = 0xFFFFFFFFFFFFFFFF

IPV6_TEXT: Final = b"0123456789abcdefABCDEF:."
IPV6_TEXT_MAX: Final = 45  # the longest form, with an IPv4 address in it


def is_digit(char: int) -> bool:
    """Whether a byte is a decimal digit."""
    return 0x30 <= char <= 0x39


def is_alpha(char: int) -> bool:
    """Whether a byte is an ASCII letter."""
    return 0x41 <= char <= 0x5A or 0x61 <= char <= 0x7A


def number_at(data: bytes, at: int) -> tuple[int, int]:
    """Read decimal digits [simple_strtoul]: the number, modulo 2^64, and where it ends; 0 if there are none."""
    value = 0
    while at < len(data) and is_digit(data[at]):
        value = (value * 10 + data[at] - 0x30) & ULONG
        at += 1
    return value, at


def ipv4_at(data: bytes, at: int) -> tuple[bytes, int]:
    """Read an IPv4 address with dots: its bytes and where it ends; b"" if there is none."""
    address = b""
    for part in range(4):
        value, end = number_at(data, at)
        if end == at or end - at > 3 or value > 255:
            return b"", at
        address += bytes((value,))
        at = end
        if part < 3:
            if at >= len(data) or data[at] != 0x2E:
                return b"", at
            at += 1
    return address, at


def ipv6_at(data: bytes, at: int) -> tuple[bytes, int]:
    """Read an IPv6 address (RFC 4291 2.2): its bytes and where it ends; b"" if there is none."""
    end = at
    while end < len(data) and end - at <= IPV6_TEXT_MAX and data[end] in IPV6_TEXT:
        end += 1
    try:
        return IPv6Address(data[at:end].decode("ascii")).packed, end
    except ValueError:
        return b"", at
