"""SIP, telephony (RFC 3261), and the SDP in it (RFC 8866) [nf_conntrack_sip.c].

An INVITE and the answers to it carry a description of where media are to be sent: `c=` names the address, each `m=` a
port for RTP, and the next one is RTCP's. A REGISTER says where calls are to be sent, which is expected from the moment
that the registrar agrees, for as long as it says.

Only addresses that are written out count, and only the speaker's own: who announces somebody else's is let talk, and
nothing is opened for him.
"""

from typing import Final

from conntrackd.const import IPPROTO_TCP, IPPROTO_UDP, IPS_EXPECTED, NF_ACCEPT, NF_DROP
from conntrackd.core.conn import Conn, refresh
from conntrackd.core.expect import (
    ANY_PORT,
    EXPECT_ALREADY,
    EXPECT_INACTIVE,
    EXPECT_OK,
    EXPECT_PERMANENT,
    expect_from,
)
from conntrackd.core.helper import Help, Helper, Message, Policy
from conntrackd.core.helpers.text import ipv4_at, ipv6_at, is_alpha, is_digit, number_at
from conntrackd.core.net import Conntrack
from conntrackd.core.tuples import destination, source
from conntrackd.wire.fields import u32

MASTER_TIMEOUT_MS: Final = 3_600_000
PORT: Final = 5060
PORT_MIN: Final = 1024
PORT_MAX: Final = 65535
PORT_DIGITS: Final = 5
UINT: Final = 0xFFFFFFFF
NUMBER_DIGITS: Final = 11  # of any other number, zeros in front of it included

VERSION: Final = b"SIP/2.0 "
SHORTEST: Final = 11  # "SIP/2.0 200"
MESSAGES_MAX: Final = 64  # read in one TCP segment

# Classes of expectations.
SIGNALLING: Final = 0
AUDIO: Final = 1
VIDEO: Final = 2
IMAGE: Final = 3
MEDIA_TYPES: Final = ((b"audio ", AUDIO), (b"video ", VIDEO), (b"image ", IMAGE))
MEDIA_MAX: Final = 3  # read in one description


class SipHelp(Help):
    """The sequence numbers (CSeq) of the requests whose answers matter."""

    def __init__(self, helper: Helper) -> None:
        super().__init__(helper)
        self.register_cseq = 0
        self.invite_cseq = 0

    def freeze(self) -> bytes:
        """Write both."""
        return self.register_cseq.to_bytes(4, "big") + self.invite_cseq.to_bytes(4, "big")

    def thaw(self, kept: bytes) -> bool:
        """Remember what `freeze` wrote; False if it is not that."""
        if len(kept) != 8:
            return False
        self.register_cseq, self.invite_cseq = u32(kept, 0), u32(kept, 4)
        return True


class Sip(Helper):
    """The helper "sip"."""

    def __init__(self) -> None:
        policies = [
            Policy("signalling", 1, 180_000),
            Policy("audio", 4, 180_000),
            Policy("video", 4, 180_000),
            Policy("image", 2, 180_000),
        ]
        super().__init__("sip", (IPPROTO_UDP, IPPROTO_TCP), policies)

    def new_help(self) -> Help:
        """Make what a signalling connection keeps."""
        return SipHelp(self)

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:
        """Read a datagram, or a segment that begins with a message; returns NF_ACCEPT or NF_DROP."""
        payload = message.payload
        if not payload:
            return NF_ACCEPT
        refresh(ct, MASTER_TIMEOUT_MS, now_ms)
        if len(payload) < SHORTEST:
            return NF_ACCEPT
        if ct.protonum == IPPROTO_UDP:
            verdict = self.read_message(net, ct, payload, message.reply, now_ms)
            return NF_ACCEPT if message.missing else verdict
        at = 0
        for _ in range(MESSAGES_MAX):
            size = message_length(payload, at)
            if size == 0 or at + size > len(payload):
                break  # not all of it is here
            verdict = self.read_message(net, ct, payload[at : at + size], message.reply, now_ms)
            if verdict != NF_ACCEPT:
                return verdict
            at += size
        return NF_ACCEPT

    def read_message(self, net: Conntrack, ct: Conn, text: bytes, reply: bool, now_ms: int) -> int:
        """Read one message; returns NF_ACCEPT or NF_DROP."""
        if text[: len(VERSION)].upper() == VERSION:
            return self.read_response(net, ct, text, reply, now_ms)
        return self.read_request(net, ct, text, reply, now_ms)

    def read_request(self, net: Conntrack, ct: Conn, text: bytes, reply: bool, now_ms: int) -> int:
        """Read a request; returns NF_ACCEPT or NF_DROP."""
        info = ct.help
        assert isinstance(info, SipHelp)
        method = method_at(text, 0)
        size = len(method)
        if not method or text[size] != 0x20 or not is_alpha(text[size + 1]):
            return NF_ACCEPT
        cseq, end = read_cseq(text)
        if end < 0:
            return NF_DROP
        if method == b"REGISTER":
            return self.register(net, ct, info, text, reply, cseq, now_ms)
        if method == b"BYE":
            self.end_media(net, info, now_ms)
            return NF_ACCEPT
        if method == b"INVITE":
            self.end_media(net, info, now_ms)
        verdict = self.read_description(net, ct, text, reply, now_ms)
        if method == b"INVITE" and verdict == NF_ACCEPT:
            info.invite_cseq = cseq
        return verdict

    def read_response(self, net: Conntrack, ct: Conn, text: bytes, reply: bool, now_ms: int) -> int:
        """Read a response; returns NF_ACCEPT or NF_DROP."""
        info = ct.help
        assert isinstance(info, SipHelp)
        code, _ = uint_at(text, len(VERSION))
        cseq, end = read_cseq(text)
        if code == 0 or end < 0:
            return NF_DROP
        method = method_at(text, end + 1)
        if method == b"REGISTER":
            return self.registered(net, ct, info, text, reply, cseq, code, now_ms)
        if method == b"INVITE" or method == b"UPDATE" or method == b"PRACK":
            if 100 <= code <= 299:
                return self.read_description(net, ct, text, reply, now_ms)
            if info.invite_cseq == cseq:
                self.end_media(net, info, now_ms)
        return NF_ACCEPT

    # --- Media ------------------------------------------------------------------------------------------------

    def read_description(self, net: Conntrack, ct: Conn, text: bytes, reply: bool, now_ms: int) -> int:
        """Expect the media that a session description announces [process_sdp]; returns NF_ACCEPT or NF_DROP."""
        ipv6 = len(ct.orig) == 37
        start = line_value(text, 0, b"v=", b"")
        if start < 0 or start >= len(text) or not is_digit(text[start]):
            return NF_ACCEPT
        session_address = connection_address(text, start, ipv6)
        at = start
        count = 0
        while count < MEDIA_MAX:
            at = line_value(text, at, b"m=", b"")
            if at < 0:
                break
            end = media_end(text, at)
            if end == 0:
                break
            media_class = 0
            for name, number in MEDIA_TYPES:
                if end - at >= len(name) and text.startswith(name, at):
                    media_class = number
                    at += len(name)
                    break
            if media_class == 0:
                at = end
                continue
            port, _ = uint_at(text, at)
            if port == 0:
                continue  # a stream that is not wanted
            if port < PORT_MIN or port > PORT_MAX:
                return NF_DROP
            address = connection_address(text, at, ipv6) or session_address
            if not address:
                return NF_DROP
            if not self.expect_media(net, ct, media_class, address, port, reply, now_ms):
                return NF_DROP
            count += 1
        return NF_ACCEPT

    def expect_media(
        self, net: Conntrack, ct: Conn, media_class: int, address: bytes, port: int, reply: bool, now_ms: int
    ) -> bool:
        """Expect RTP and RTCP [set_expected_rtp_rtcp]; returns whether the announcement may pass on."""
        speaker, other = (ct.reply, ct.orig) if reply else (ct.orig, ct.reply)
        sender = b""
        if net.sysctl.sip_direct_media:
            if address != source(speaker):
                return True
            sender = source(other)
        expectations, limit = net.table.expectations, net.sysctl.expect_max
        # The same call may come by more than one connection.
        shown = expect_from(ct, media_class, IPPROTO_UDP, sender, 0, address, port).tuple
        known = expectations.find(shown, ct.zone, now_ms)
        if known is not None and known.master is not ct and known.expect_class == media_class:
            help_of_known = known.master.help
            if help_of_known is not None and help_of_known.helper is self:
                return True
        port &= ~1
        rtp = expect_from(ct, media_class, IPPROTO_UDP, sender, ANY_PORT, address, port)
        rtcp = expect_from(ct, media_class, IPPROTO_UDP, sender, ANY_PORT, address, port + 1)
        # Some announce one port for two kinds of media: then it is expected already.
        inserted = expectations.insert(rtp, True, limit, now_ms)
        if inserted != EXPECT_OK and inserted != EXPECT_ALREADY:
            return False
        second = expectations.insert(rtcp, True, limit, now_ms)
        if second == EXPECT_OK or second == EXPECT_ALREADY:
            return True
        if inserted == EXPECT_OK:
            expectations.unlink(rtp, now_ms)
        return False

    def end_media(self, net: Conntrack, info: SipHelp, now_ms: int) -> None:
        """Expect no media any more: the call is over, or described anew."""
        for expect in list(info.expectations):
            if expect.expect_class != SIGNALLING:
                net.table.expectations.unlink(expect, now_ms)

    # --- Registration -----------------------------------------------------------------------------------------

    def register(
        self, net: Conntrack, ct: Conn, info: SipHelp, text: bytes, reply: bool, cseq: int, now_ms: int
    ) -> int:
        """Prepare for calls to who registers [process_register_request]; returns NF_ACCEPT or NF_DROP."""
        if ct.status & IPS_EXPECTED:
            return NF_ACCEPT  # a connection that a registration opened opens no other
        contact = Contact(text, len(ct.orig) == 37)
        if not contact.read_next():
            return NF_ACCEPT
        speaker, other = (ct.reply, ct.orig) if reply else (ct.orig, ct.reply)
        if contact.address != source(speaker):
            return NF_ACCEPT
        protonum = transport_parameter(text, contact.end, ct.protonum)
        if protonum != ct.protonum:
            return NF_ACCEPT
        seconds = parameter_number(text, contact.end, b"expires=", expires_header(text))
        if seconds < 0:
            return NF_DROP
        if seconds > 0:
            registrar = source(other) if net.sysctl.sip_direct_signalling else b""
            flags = EXPECT_PERMANENT | EXPECT_INACTIVE
            call = expect_from(ct, SIGNALLING, protonum, registrar, ANY_PORT, contact.address, contact.port, flags)
            call.helper = self
            if net.table.expectations.insert(call, False, net.sysctl.expect_max, now_ms) != EXPECT_OK:
                return NF_DROP
        info.register_cseq = cseq
        return NF_ACCEPT

    def registered(
        self, net: Conntrack, ct: Conn, info: SipHelp, text: bytes, reply: bool, cseq: int, code: int, now_ms: int
    ) -> int:
        """Let calls come once the registrar agrees [process_register_response]; returns NF_ACCEPT or NF_DROP."""
        if info.register_cseq != cseq or 100 <= code <= 199:
            return NF_ACCEPT
        if 200 <= code <= 299:
            expires = expires_header(text)
            listener = destination(ct.reply if reply else ct.orig)
            contact = Contact(text, len(ct.orig) == 37)
            while contact.read_next():
                if contact.address == listener and transport_parameter(text, contact.end, ct.protonum) == ct.protonum:
                    seconds = parameter_number(text, contact.end, b"expires=", expires)
                    if seconds < 0:
                        return NF_DROP
                    if seconds == 0:
                        break
                    if self.activate(info, contact, ct.protonum, seconds, now_ms):
                        return NF_ACCEPT
        for expect in list(info.expectations):
            if expect.expect_class == SIGNALLING:
                net.table.expectations.unlink(expect, now_ms)
                break
        return NF_ACCEPT

    def activate(self, info: SipHelp, contact: "Contact", protonum: int, seconds: int, now_ms: int) -> bool:
        """Let calls to a contact come for so long; returns whether they were expected."""
        key = bytes((protonum,)) + contact.address + contact.port.to_bytes(2, "big")
        size = len(contact.address)
        for expect in info.expectations:
            shown = expect.tuple
            shown_key = shown[:1] + shown[1 + size : 1 + 2 * size] + shown[-2:]
            if expect.expect_class == SIGNALLING and shown_key == key:
                expect.flags &= ~EXPECT_INACTIVE
                expect.expires_ms = now_ms + seconds * 1000
                return True
        return False


# --- The text of a message ------------------------------------------------------------------------------------
# Header lines begin behind a line break; a line that begins with white space continues the one before (RFC 3261 7.3.1).


def line_start(text: bytes, at: int) -> int:
    """Return where the next line begins at or behind `at`, after CR, LF or both; len(text) if none does."""
    size = len(text)
    while at < size and text[at] != 0x0D and text[at] != 0x0A:
        at += 1
    if at < size and text[at] == 0x0D and at + 1 < size and text[at + 1] == 0x0A:
        return at + 2
    return min(at + 1, size)


def value_end(text: bytes, at: int) -> int:
    """Return where the header ends that `at` is in, with the lines that continue it."""
    size = len(text)
    while at < size:
        if text[at] != 0x0D and text[at] != 0x0A:
            at += 1
            continue
        start = line_start(text, at)
        if start >= size or (text[start] != 0x20 and text[start] != 0x09):
            return at
        at = start
    return size


def skip_space(text: bytes, at: int, end: int) -> int:
    """Skip white space and the line breaks of a header that is continued."""
    while at < end and text[at] in b" \t\r\n":
        at += 1
    return at


def uint_at(text: bytes, at: int) -> tuple[int, int]:
    """Read a number of 32 bits and where it ends [sip_strtouint]; 0 and `at` if there is none, or it is too long."""
    number, end = number_at(text, at)
    return (number, end) if end - at <= NUMBER_DIGITS and number <= UINT else (0, at)


def header(text: bytes, name: bytes, compact: bytes, at: int) -> tuple[int, int]:
    """Find the next header of a name, or of its compact form, in a line that begins behind `at`.

    Returns where its value begins and ends, or -1 and 0.
    """
    size = len(text)
    at = line_start(text, at)
    while at < size:
        length = 0
        if text[at : at + len(name)].lower() == name:
            length = len(name)
        elif compact and text[at : at + 1].lower() == compact and at + 1 < size and not is_alpha(text[at + 1]):
            length = 1
        if length:
            end = value_end(text, at)
            colon = skip_space(text, at + length, end)
            if colon >= end or text[colon] != 0x3A:
                return -1, 0  # as the kernel: what only begins like the name ends the search
            return skip_space(text, colon + 1, end), end
        at = line_start(text, at + 1)
    return -1, 0


def header_number(text: bytes, name: bytes, compact: bytes) -> tuple[int, int]:
    """Read the number of a header, and where it ends; 0 and -1 if there is none, or a bigger one than there may be."""
    at, end = header(text, name, compact, 0)
    while at >= 0:
        if at < end and is_digit(text[at]):
            number, stop = uint_at(text, at)
            return (number, stop) if stop > at else (0, -1)
        at, end = header(text, name, compact, at)
    return 0, -1


def read_cseq(text: bytes) -> tuple[int, int]:
    """Read the sequence number of the request, and where it ends; -1 if there is none."""
    cseq, end = header_number(text, b"cseq", b"")
    return cseq, end


def expires_header(text: bytes) -> int:
    """Read how many seconds a registration is for, as long as its contact does not say; 0 if it is not said."""
    seconds, _ = header_number(text, b"expires", b"")
    return seconds


def message_length(text: bytes, at: int) -> int:
    """Return the length of the message at `at` in a stream, by its Content-Length; 0 if it has none."""
    rest = text[at:]
    length, end = header_number(rest, b"content-length", b"l")
    if end < 0:
        return 0
    body = rest.find(b"\r\n\r\n", end)
    return body + 4 + length if body >= 0 else 0


def method_at(text: bytes, at: int) -> bytes:
    """Read the method of a request that matters here; b"" if it does not."""
    start = text[at : at + 8].upper()
    for method in (b"INVITE", b"UPDATE", b"ACK", b"PRACK", b"BYE", b"REGISTER"):
        if start.startswith(method):
            return method
    return b""


class Contact:
    """A walk along the addresses of Contact headers (RFC 3261 20.10); each may list several.

    It ends at an address whose port nobody may be called on.
    """

    def __init__(self, text: bytes, ipv6: bool) -> None:
        self.text = text
        self.lower = text.lower()
        self.ipv6 = ipv6
        self.address = b""
        self.port = 0
        self.end = 0  # where the address and port end
        self.header_end = 0

    def read_next(self) -> bool:
        """Read the next one that is written out, in the header of the last or another; returns whether there is one."""
        at = self.end
        while True:
            comma = self.text.find(b",", at, self.header_end)
            at = self.lower.find(b"sip:", comma, self.header_end) if comma >= 0 else -1
            if at < 0:
                return self.read_header(self.end)
            at += 4
            if self.read_uri(at):
                return self.port_is_fine()

    def read_header(self, at: int) -> bool:
        """Read the first one of the next header that can be read."""
        value, end = header(self.text, b"contact", b"m", at)
        while value >= 0:
            self.header_end = end
            at = self.lower.find(b"sip:", value, end)
            if at >= 0 and self.read_uri(at + 4):
                return self.port_is_fine()
            value, end = header(self.text, b"contact", b"m", value)
        return False

    def read_uri(self, at: int) -> bool:
        """Read the address and port of the URI that begins before `at`; returns whether the address is written out."""
        text = self.text
        user = text.find(b"@", at, self.header_end)
        if user >= 0 and text.find(b"\r", at, user) < 0 and text.find(b"\n", at, user) < 0:
            at = user + 1
        self.address, end = address_at(text, at, self.ipv6)
        if not self.address:
            return False
        self.port = PORT
        if end < len(text) and text[end] == 0x3A:
            port, stop = number_at(text, end + 1)
            # As the kernel: 05060 is a port, 005060 is none, and behind it comes something.
            self.port = port if stop - end - 1 <= PORT_DIGITS and stop < len(text) else 0
            end = stop
        self.end = end
        return True

    def port_is_fine(self) -> bool:
        """Whether it is a port to be called on."""
        return PORT_MIN <= self.port <= PORT_MAX


def address_at(text: bytes, at: int, ipv6: bool) -> tuple[bytes, int]:
    """Read an address, one of IPv6 in brackets: its bytes and where it ends; b"" if there is none."""
    if not ipv6:
        return ipv4_at(text, at)
    if at >= len(text) or text[at] != 0x5B:
        return b"", at
    address, end = ipv6_at(text, at + 1)
    if not address or end >= len(text) or text[end] != 0x5D:
        return b"", at
    return address, end + 1


def parameter(text: bytes, at: int, name: bytes) -> int:
    """Return where the value of a parameter begins, before the next comma of the header; -1 if it is not there."""
    end = value_end(text, at)
    comma = text.find(b",", at, end)
    stop = comma - 1 if comma >= 0 else end
    found = text[at:stop].lower().find(name)
    return at + found + len(name) if found >= 0 else -1


def transport_parameter(text: bytes, at: int, protonum: int) -> int:
    """Read the protocol that a contact wants to be called by: by default that of the message; 0 if it is another."""
    found = parameter(text, at, b"transport=")
    if found < 0:
        return protonum
    name = text[found : found + 3].upper()
    if name == b"TCP":
        return IPPROTO_TCP
    return IPPROTO_UDP if name == b"UDP" else 0


def parameter_number(text: bytes, at: int, name: bytes, default: int) -> int:
    """Read the number of a parameter: the default if it is not there, -1 if it is no number."""
    found = parameter(text, at, name)
    if found < 0:
        return default
    number, stop = uint_at(text, found)
    return number if stop > found else -1


# --- The text of a session description ------------------------------------------------------------------------


def line_value(text: bytes, at: int, name: bytes, stop: bytes) -> int:
    """Return where the value of the next line of a type begins, behind `at`; -1 if there is none before a `stop`."""
    size = len(text)
    at = line_start(text, at)
    while at < size:
        start = text[at : at + 2].lower()
        if stop and start == stop:
            return -1
        if start == name:
            return at + len(name)
        at = line_start(text, at + 1)
    return -1


def media_end(text: bytes, at: int) -> int:
    """Return where `audio 49170` ends, 0 if it is no such text."""
    size = len(text)
    while at < size and is_alpha(text[at]):
        at += 1
    if at >= size or text[at] != 0x20:
        return 0
    at += 1
    while at < size and is_digit(text[at]):
        at += 1
    return at


def connection_address(text: bytes, at: int, ipv6: bool) -> bytes:
    """Read the address of the next `c=` line before another `m=` line; b"" if there is none."""
    at = line_value(text, at, b"c=", b"m=")
    if at < 0:
        return b""
    end = at
    while end < len(text) and text[end] != 0x0D and text[end] != 0x0A:
        end += 1
    family = b"IN IP6 " if ipv6 else b"IN IP4 "
    found = text.find(family, at, end)
    if found < 0:
        return b""
    found += len(family)
    return ipv6_at(text, found)[0] if ipv6 else ipv4_at(text, found)[0]
