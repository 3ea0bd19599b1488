"""Integers in network byte order. The caller has checked that the bytes are there."""


def u16(data: bytes, at: int) -> int:
    """Read the 16-bit number at `at`."""
    return data[at] << 8 | data[at + 1]


def u32(data: bytes, at: int) -> int:
    """Read the 32-bit number at `at`."""
    return data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3]
