"""The Internet checksum (RFC 1071) and SCTP's CRC32c (RFC 9260 appendix A).

A ones' complement sum is the number modulo 65535, so the interpreter's long integers add a packet up in one step: 3 us
for 1400 bytes where a loop over words takes hundreds.
"""

import google_crc32c

from conntrackd.const import IPPROTO_ICMP


def checksum_ok(data: bytes, dataoff: int, end: int, length: int, protonum: int) -> bool:
    """Verify the transport checksum over data[dataoff:end] [nf_ip_checksum, nf_ip6_checksum].

    `length` is the transport length that the pseudo-header names; ICMP over IPv4 has no pseudo-header.
    """
    total = int.from_bytes(data[dataoff:end], "big")
    if (end - dataoff) & 1:
        total <<= 8  # the odd byte is the high half of a word (RFC 1071 2)
    if data[0] >> 4 == 4:
        if protonum != IPPROTO_ICMP:
            total += int.from_bytes(data[12:20], "big") + protonum + length
    else:
        total += int.from_bytes(data[8:40], "big") + protonum + length
    return total % 0xFFFF == 0


def sctp_checksum_ok(data: bytes, dataoff: int) -> bool:
    """Verify the CRC32c of the SCTP packet at `dataoff`, its own field taken as zero and stored low byte first."""
    covered = data[dataoff : dataoff + 8] + b"\0\0\0\0" + data[dataoff + 12 :]
    return int(google_crc32c.value(covered)) == int.from_bytes(data[dataoff + 8 : dataoff + 12], "little")


def checksum(data: bytes) -> bytes:
    """Compute the checksum of data whose own field is zero, for a packet of ours."""
    total = int.from_bytes(data, "big")
    if len(data) & 1:
        total <<= 8
    return (0xFFFF - total % 0xFFFF).to_bytes(2, "big")
