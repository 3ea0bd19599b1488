"""The Internet checksum (RFC 1071) and SCTP's CRC32c (RFC 9260 appendix A).

A ones' complement sum is the number modulo 65535. Compiled, a loop over words adds a packet of 1400 bytes up in 0.1 us;
in the interpreter that would take 30, and one long integer takes 3.
"""

from typing import Final

import google_crc32c
from librt.strings import read_i64_be
from mypy_extensions import i64

from conntrackd.const import IPPROTO_ICMP

COMPILED: Final = not __file__.endswith(".py")
LOW: Final = 0xFFFFFFFF


def checksum_ok(data: bytes, dataoff: int, end: int, length: int, protonum: int) -> bool:
    """Verify the transport checksum over data[dataoff:end] [nf_ip_checksum, nf_ip6_checksum].

    `length` is the transport length that the pseudo-header names; ICMP over IPv4 has no pseudo-header.
    """
    total = word_sum(data, dataoff, end) if COMPILED else long_sum(data, dataoff, end)
    if data[0] >> 4 == 4:
        if protonum != IPPROTO_ICMP:
            total += int.from_bytes(data[12:20], "big") + protonum + length
    else:
        total += int.from_bytes(data[8:40], "big") + protonum + length
    return total % 0xFFFF == 0


def word_sum(data: bytes, start: int, end: int) -> int:
    """Add data[start:end] up in words of 32 bits: what it is modulo 65535, not reduced. For compiled code."""
    at: i64 = start
    stop: i64 = end
    total: i64 = 0
    while at + 8 <= stop:
        words = read_i64_be(data, at)
        total += (words & LOW) + (words >> 32 & LOW)
        at += 8
    rest: int = total
    return rest + long_sum(data, at, end)


def long_sum(data: bytes, start: int, end: int) -> int:
    """Read data[start:end] as one number, which is the same modulo 65535 as the sum of its words."""
    total = int.from_bytes(data[start:end], "big")
    return total << 8 if (end - start) & 1 else total  # the odd byte is the high half of a word (RFC 1071 2)


def sctp_checksum_ok(data: bytes, dataoff: int) -> bool:
    """Verify the CRC32c of the SCTP packet at `dataoff`, its own field taken as zero and stored low byte first."""
    covered = data[dataoff : dataoff + 8] + b"\0\0\0\0" + data[dataoff + 12 :]
    return int(google_crc32c.value(covered)) == int.from_bytes(data[dataoff + 8 : dataoff + 12], "little")


def checksum(data: bytes) -> bytes:
    """Compute the checksum of data whose own field is zero, for a packet of ours."""
    return (0xFFFF - long_sum(data, 0, len(data)) % 0xFFFF).to_bytes(2, "big")
