"""A capture file that other tools open: pcapng (draft-ietf-opsawg-pcapng), as far as traces need it.

Not pcap, for pcapng has room for what a trace knows besides the bytes: a packet's interface here is the hook and the
interface where it was seen, and its comment is what came of it.
"""

import struct
from pathlib import Path

SECTION_HEADER = 0x0A0D0D0A
INTERFACE = 1
ENHANCED_PACKET = 6
BYTE_ORDER = 0x1A2B3C4D
LINKTYPE_RAW = 101  # begins with the IP header
COMMENT = 1
IF_NAME = 2


class Capture:
    """A file that is written packet by packet, each complete at once. Raises OSError."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._interfaces: dict[str, int] = {}
        self._write(SECTION_HEADER, struct.pack("=IHHq", BYTE_ORDER, 1, 0, -1))

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def packet(self, data: bytes, length: int, seconds: float, interface: str, comment: str) -> None:
        """Write a packet, of which `data` are the first bytes."""
        number = self._interfaces.get(interface)
        if number is None:
            number = self._interfaces[interface] = len(self._interfaces)
            self._write(INTERFACE, struct.pack("=HHI", LINKTYPE_RAW, 0, 0) + _option(IF_NAME, interface))
        at_us = int(seconds * 1_000_000)
        head = struct.pack("=IIIII", number, at_us >> 32, at_us & 0xFFFFFFFF, len(data), max(length, len(data)))
        self._write(ENHANCED_PACKET, head + _padded(data) + _option(COMMENT, comment))

    def _write(self, kind: int, body: bytes) -> None:
        size = struct.pack("=I", len(body) + 12)
        self._file.write(struct.pack("=I", kind) + size + body + size)


def _option(code: int, text: str) -> bytes:
    value = text.encode()
    return struct.pack("=HH", code, len(value)) + _padded(value) + bytes(4)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
