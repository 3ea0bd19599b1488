"""Integers in network byte order. The caller has checked that the bytes are there.

librt is mypyc's own runtime: compiled, a read is one load and one comparison, where indexing byte by byte is eight.
"""

from librt.strings import read_i16_be, read_i32_be


def u16(data: bytes, at: int) -> int:
    """Read the 16-bit number at `at`."""
    value: int = read_i16_be(data, at)
    return value & 0xFFFF


def u32(data: bytes, at: int) -> int:
    """Read the 32-bit number at `at`."""
    value: int = read_i32_be(data, at)
    return value & 0xFFFFFFFF
