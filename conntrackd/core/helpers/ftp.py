"""FTP (RFC 959, RFC 2428) [nf_conntrack_ftp.c]: a data connection is announced on the control connection.

By the client, which listens (active):        PORT 10,0,0,5,4,1    EPRT |2|2001:db8::5|1025|
By the server, which listens (passive):       227 ... (10,0,0,80,4,1)    229 ... (|||1025|)

An announcement counts only at the beginning of a line, and a line begins where a segment that ended in a newline left
off: otherwise whoever can make one side send his text, cut at the right place, could open ports on it. So the first
segment of each side is never read. What is left unfinished is dropped: its sender will send it again, whole.
"""

from typing import Final

from conntrackd.const import IPPROTO_TCP, NF_ACCEPT, NF_DROP
from conntrackd.core.conn import Conn
from conntrackd.core.expect import ANY_PORT, EXPECT_OK, expect_from
from conntrackd.core.helper import Help, Helper, Message, Policy
from conntrackd.core.helpers.text import ipv6_at, is_digit
from conntrackd.core.net import Conntrack
from conntrackd.core.proto.tcp import before
from conntrackd.core.proto.tcp_conn import MASK
from conntrackd.core.tuples import source
from conntrackd.wire.fields import u32

LINES_REMEMBERED: Final = 2  # beginnings of lines, per side: a retransmission must be recognised

# What `find_command` answers, besides where the argument begins.
NOT_THERE: Final = 0
PARTIAL: Final = -1

NOWHERE: Final = (b"", 0)  # an argument that can't be read


class FtpHelp(Help):
    """Where lines begin, as sequence numbers."""

    def __init__(self, helper: Helper) -> None:
        super().__init__(helper)
        self.client_lines: list[int] = []
        self.server_lines: list[int] = []

    def freeze(self) -> bytes:
        """Write how many lines of the client there are, and where all begin."""
        lines = self.client_lines + self.server_lines
        return bytes((len(self.client_lines),)) + b"".join([seq.to_bytes(4, "big") for seq in lines])

    def thaw(self, kept: bytes) -> bool:
        """Remember what `freeze` wrote; False if it is not that."""
        lines = [u32(kept, at) for at in range(1, len(kept) - 3, 4)]
        if not kept or len(kept) != 1 + 4 * len(lines):
            return False
        self.client_lines, self.server_lines = lines[: kept[0]], lines[kept[0] :]
        return max(len(self.client_lines), len(self.server_lines)) <= LINES_REMEMBERED


class Ftp(Helper):
    """The helper "ftp"."""

    def __init__(self) -> None:
        super().__init__("ftp", (IPPROTO_TCP,), [Policy("", 1, 300_000)])

    def new_help(self) -> Help:
        """Make what a control connection keeps."""
        return FtpHelp(self)

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Read one segment of the control connection; returns NF_ACCEPT or NF_DROP."""
        info = ct.help
        assert isinstance(info, FtpHelp)
        lines = info.server_lines if message.reply else info.client_lines
        payload = message.payload
        verdict = NF_ACCEPT
        if message.seq in lines:
            found, address, port = announcement(payload, ct.reply if message.reply else ct.orig, message.reply)
            if found == PARTIAL and not message.missing:
                return NF_DROP
            if found > 0 and not self.expect_data(net, ct, message.reply, address, port, now_ms):
                verdict = NF_DROP
        if payload and payload[-1] == 0x0A and not message.missing:
            remember_line(lines, (message.seq + len(payload)) & MASK)
        return verdict

    def expect_data(self, net: Conntrack, ct: Conn, reply: bool, address: bytes, port: int, now_ms: int) -> bool:
        """Expect the data connection; returns whether the announcement may pass on."""
        speaker, other = (ct.reply, ct.orig) if reply else (ct.orig, ct.reply)
        own = source(speaker)
        # Somebody else's address: who follows such an announcement opens a hole to a third party.
        if address != own and (len(address) != len(own) or not net.sysctl.ftp_loose):
            return True
        expect = expect_from(ct, 0, IPPROTO_TCP, source(other), ANY_PORT, address, port)
        return net.table.expectations.insert(expect, False, net.sysctl.expect_max, now_ms) == EXPECT_OK


def announcement(payload: bytes, key: bytes, reply: bool) -> tuple[int, bytes, int]:
    """Read the announcement at the beginning of a line: 1, address and port; NOT_THERE or PARTIAL.

    `key` is the tuple of the line's direction: 229 names no address, it means the speaker's own.
    """
    ipv6 = len(key) == 37
    if reply:
        at = find_command(payload, b"227 ", -1)
        if at == NOT_THERE:
            at = find_command(payload, b"229 ", 0x28)
            port = read_epsv(payload, at) if at > 0 else 0
            address = source(key) if port else b""
        else:
            # "The format of the 227 reply ... is not well standardized" (RFC 1123 4.1.2.6): take the first digit.
            while 0 < at < len(payload) and not is_digit(payload[at]):
                at += 1
            address, port = read_port(payload, at, -1) if at > 0 else NOWHERE
    else:
        at = find_command(payload, b"PORT", 0x20)
        if at == NOT_THERE:
            at = find_command(payload, b"EPRT", 0x20)
            address, port = read_eprt(payload, at, ipv6) if at > 0 else NOWHERE
        else:
            address, port = read_port(payload, at, 0x0D) if at > 0 else NOWHERE
    if at > 0:
        return (1, address, port) if address else (PARTIAL, b"", 0)
    return at, b"", 0


def find_command(payload: bytes, pattern: bytes, skip: int) -> int:
    """Return where the argument of a command begins, behind the character `skip` [find_pattern]."""
    size = len(pattern)
    start = payload[:size].upper()
    if len(payload) <= size:
        return PARTIAL if pattern.startswith(start) else NOT_THERE
    if start != pattern:
        return NOT_THERE
    if skip < 0:
        return size
    at = payload.find(skip, size)
    return at + 1 if at >= 0 else PARTIAL


def read_numbers(payload: bytes, at: int, count: int, separator: int, terminator: int) -> tuple[list[int], int]:
    """Read numbers and where they end, at the terminator (-1: anything); an empty list if they are not there."""
    numbers = [0]
    while at < len(payload):
        char = payload[at]
        if is_digit(char):
            numbers[-1] = (numbers[-1] * 10 + char - 0x30) & 0xFFFFFFFF
        elif char == separator:
            if len(numbers) == count:
                return [], at
            numbers.append(0)
        elif (char == terminator or terminator < 0) and len(numbers) == count:
            return numbers, at
        else:
            return [], at
        at += 1
    return [], at


def four_bytes(numbers: list[int]) -> bytes:
    """Put an IPv4 address together, out of numbers that nobody has bounded."""
    value = numbers[0] << 24 | numbers[1] << 16 | numbers[2] << 8 | numbers[3]
    return (value & 0xFFFFFFFF).to_bytes(4, "big")


def read_port(payload: bytes, at: int, terminator: int) -> tuple[bytes, int]:
    """Read `10,0,0,5,4,1` (RFC 959 5.3.2)."""
    numbers, end = read_numbers(payload, at, 6, 0x2C, terminator)
    if not numbers or end == at:
        return NOWHERE
    port = (numbers[4] << 8 | numbers[5]) & 0xFFFF
    return four_bytes(numbers), port


def read_eprt(payload: bytes, at: int, ipv6: bool) -> tuple[bytes, int]:
    """Read `|1|10.0.0.5|1025|` or `|2|2001:db8::5|1025|` (RFC 2428 2)."""
    if len(payload) - at <= 3:
        return NOWHERE
    delimiter = payload[at]
    if not is_delimiter(delimiter) or payload[at + 2] != delimiter:
        return NOWHERE
    if payload[at + 1] != (0x32 if ipv6 else 0x31):
        return NOWHERE
    at += 3
    if ipv6:
        address, end = ipv6_at(payload, at)
        if not address or end >= len(payload) or payload[end] != delimiter:
            return NOWHERE
    else:
        numbers, end = read_numbers(payload, at, 4, 0x2E, delimiter)
        if not numbers or end == at:
            return NOWHERE
        address = four_bytes(numbers)
    port = read_delimited_port(payload, end + 1, delimiter)
    return (address, port) if port else NOWHERE


def read_epsv(payload: bytes, at: int) -> int:
    """Read `|||1025|` (RFC 2428 3): the port, 0 if it is not there."""
    if len(payload) - at <= 3:
        return 0
    delimiter = payload[at]
    if not is_delimiter(delimiter) or payload[at + 1] != delimiter or payload[at + 2] != delimiter:
        return 0
    return read_delimited_port(payload, at + 3, delimiter)


def read_delimited_port(payload: bytes, at: int, delimiter: int) -> int:
    """Read a port up to its delimiter; 0 if it is not there."""
    port = 0
    while at < len(payload):
        char = payload[at]
        if char == delimiter:
            return port
        if not is_digit(char):
            return 0
        port = (port * 10 + char - 0x30) & 0xFFFF
        at += 1
    return 0


def is_delimiter(char: int) -> bool:
    """Whether a byte may enclose the fields of EPRT and 229: "any ASCII character 33-126", but no digit."""
    return 33 <= char <= 126 and not is_digit(char)


def remember_line(lines: list[int], seq: int) -> None:
    """Note that a line begins at a sequence number; of those remembered the oldest makes room [update_nl_seq]."""
    if seq in lines:
        return
    if len(lines) < LINES_REMEMBERED:
        lines.append(seq)
        return
    oldest = 0 if before(lines[0], lines[1]) else 1
    if before(lines[oldest], seq):
        lines[oldest] = seq
