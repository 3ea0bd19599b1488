"""Which connections the options of conntrack(8) choose.

What the language of filters can say (docs/filter.md) is said in it, and the daemon chooses; the rest is asked here, of
each connection that the daemon sends.
"""

import argparse
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

from conntrackd import api

Check = Callable[[api.Flow], bool]
Address = IPv4Address | IPv6Address

MARK_MAX: Final = 0xFFFFFFFF
PORT_PROTOCOLS: Final = ("tcp", "udp", "udplite", "sctp")
PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "icmpv6": 58, "sctp": 132, "udplite": 136}
TCP_STATES: Final = (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
    "SYN_SENT2",
)  # fmt: skip
SCTP_STATES: Final = (
    "NONE", "CLOSED", "COOKIE_WAIT", "COOKIE_ECHOED", "ESTABLISHED", "SHUTDOWN_SENT", "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT", "HEARTBEAT_SENT",
)  # fmt: skip
STATES: Final = {"tcp": TCP_STATES, "sctp": SCTP_STATES}
STATUSES: Final = ("ASSURED", "SEEN_REPLY", "UNSET", "FIXED_TIMEOUT", "EXPECTED", "UNREPLIED")

# Options of one protocol, by the names of their places: which protocols have them, and what they say.
PORTS: Final = {
    "sport": "src port",
    "dport": "dst port",
    "reply_port_src": "reply src port",
    "reply_port_dst": "reply dst port",
}
ICMP: Final = {"icmp_type": "type", "icmp_code": "code", "icmp_id": "id"}
GRE: Final = {
    "srckey": ("orig", "srckey"),
    "dstkey": ("orig", "dstkey"),
    "reply_key_src": ("reply", "srckey"),
    "reply_key_dst": ("reply", "dstkey"),
}
ADDRESSES: Final = {"src": "src", "dst": "dst", "reply_src": "reply src", "reply_dst": "reply dst"}


class OptionError(Exception):
    """The options mean nothing; the text is one sentence, the one of conntrack(8) where it has one."""


class Selection(NamedTuple):
    """What is chosen: a filter for the daemon, and what is still to be asked of what it sends."""

    filter: str
    checks: tuple[Check, ...]

    def takes(self, flow: api.Flow) -> bool:
        """Whether a connection that the filter matches is chosen."""
        return all(check(flow) for check in self.checks)


def select(args: argparse.Namespace, label_bits: Mapping[str, int]) -> Selection:
    """Read the options; `label_bits`: by the names that they use. OptionError if they can't be meant."""
    words: list[str] = []
    checks: list[Check] = []
    if args.protonum is not None:
        words.append(f"proto {_protocol_number(args.protonum)}")
    if family := _family(args):
        words.append(family)
    _add_addresses(args, words, checks)
    _add_transport(args, words, checks)
    if args.status is not None:
        words += _status(args.status)
    if args.mark is not None:
        value, mask = _mark(args.mark)
        if value & ~mask:
            checks.append(lambda _: False)  # no mark is this one
        else:
            words.append(f"mark {value}/{mask}")
    if args.zone is not None:
        words.append(f"zone {number(args.zone, 'zone', 0xFFFF)}")
    if args.id is not None:
        words.append(f"id {number(args.id, 'id', (1 << 63) - 1)}")
    words += [f"label {bit}" for bit in bits(args.label or (), label_bits)]
    _add_nat(args, checks)
    return Selection(" and ".join(words), tuple(checks))


def bits(texts: Iterable[str], label_bits: Mapping[str, int]) -> list[int]:
    """Read the names of labels with commas between them."""
    names = [each for text in texts for each in text.split(",")]
    for name in names:
        if name not in label_bits:
            raise OptionError(f"unknown label '{name}'")
    return [label_bits[name] for name in names]


def number(text: str, what: str, highest: int) -> int:
    """Read a number as C does: decimal, 0x hexadecimal or 0 octal."""
    try:
        value = int(text, 8) if text.isdecimal() and text.startswith("0") else int(text, 0)
    except ValueError:
        raise OptionError(f"Invalid {what} `{text}'") from None
    if not 0 <= value <= highest:
        raise OptionError(f"Invalid {what} `{text}'")
    return value


def choices(texts: Iterable[str], names: Sequence[str]) -> list[str]:
    """Read names with commas between them, in either case; the beginning of a name is enough."""
    return [choice(each, names) for text in texts for each in text.split(",")]


def choice(text: str, names: Sequence[str]) -> str:
    """Find the first name that begins with this text."""
    for name in names:
        if text and name.lower().startswith(text.lower()):
            return name
    raise OptionError(f"Bad parameter `{text}'")


def _protocol_number(text: str) -> int:
    name = text.lower()
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if text.isdecimal() and int(text) < 256:
        return int(text)
    try:
        return socket.getprotobyname(name)
    except OSError:
        raise OptionError(f"`{text}' unsupported protocol") from None


def protocol_name(text: str | None) -> str:
    """Name a protocol that has options of its own; "" for all others."""
    if text is None:
        return ""
    number = _protocol_number(text)
    return next((name for name, its_number in PROTOCOLS.items() if its_number == number), "")


def _family(args: argparse.Namespace) -> str:
    """Choose the family: of -f, or of the addresses."""
    family = args.family or ""
    if family not in ("", "ipv4", "ipv6"):
        raise OptionError(f"`{family}' unsupported protocol")
    for name in (*ADDRESSES, "mask_src", "mask_dst", "src_nat", "dst_nat", "any_nat"):
        text = getattr(args, name)
        if not text:
            continue
        of_text = f"ipv{_address(_nat_parts(text)[0] if name.endswith('_nat') else text.partition('/')[0]).version}"
        if family and of_text != family:
            raise OptionError("mismatched address family")
        family = of_text
    return family


def _address(text: str) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise OptionError(f"Invalid IP address `{text}'") from None


def _add_addresses(args: argparse.Namespace, words: list[str], checks: list[Check]) -> None:
    for name, place in ADDRESSES.items():
        text = getattr(args, name)
        if text is None:
            continue
        address, slash, prefix = text.partition("/")
        if slash and name.startswith("reply"):
            raise OptionError(f"CIDR notation unavailable for `--{name.replace('_', '-')}'")
        mask = getattr(args, f"mask_{name}", None)
        if mask is not None:
            checks.append(_masked_check(name, _address(address), _address(mask)))
        elif slash:
            words.append(f"{place} net {_network(address, prefix)}")
        else:
            words.append(f"{place} host {_address(address)}")
    for name in ("src", "dst"):
        if getattr(args, f"mask_{name}") is not None and getattr(args, name) is None:
            raise OptionError(f"Can't use --mask-{name} without --{name}")


def _network(address: str, prefix: str) -> IPv4Network | IPv6Network:
    base = _address(address)
    if not prefix.isdecimal() or int(prefix) > base.max_prefixlen:
        raise OptionError("Invalid netmask")
    return ip_network(f"{base}/{prefix}", strict=False)


def _masked_check(side: str, address: Address, mask: Address) -> Check:
    wanted = int(address) & int(mask)
    return lambda flow: int(ip_address(getattr(flow.orig, side))) & int(mask) == wanted


def _add_transport(args: argparse.Namespace, words: list[str], checks: list[Check]) -> None:
    """Add what belongs to one protocol; as in conntrack(8), it must be named (-p)."""
    protocol = protocol_name(args.protonum)
    for name, words_of_it in PORTS.items():
        if (text := _of(args, name, protocol, PORT_PROTOCOLS)) is not None:
            words.append(f"{words_of_it} {number(text, 'port', 0xFFFF)}")
    if (state := _of(args, "state", protocol, tuple(STATES))) is not None:
        state = "SYN_SENT2" if protocol == "tcp" and state.upper() == "LISTEN" else state.upper()
        if state not in STATES[protocol]:
            raise OptionError(f"unknown {protocol.upper()} state `{args.state}'")
        words.append(f"state {state}")
    for name, field in ICMP.items():
        if (text := _of(args, name, protocol, ("icmp", "icmpv6"))) is not None:
            checks.append(_field_check("orig", field, number(text, field, 0xFFFF)))
    for name, (direction, field) in GRE.items():
        if (text := _of(args, name, protocol, ("gre",))) is not None:
            checks.append(_field_check(direction, field, number(text, "key", 0xFFFF)))


def _of(args: argparse.Namespace, name: str, protocol: str, protocols: tuple[str, ...]) -> str | None:
    """Return the value of an option that only some protocols have."""
    text: str | None = getattr(args, name)
    if text is not None and protocol not in protocols:
        raise OptionError(f"`--{name.replace('_', '-')}' needs `-p {'|'.join(protocols)}'")
    return text


def _field_check(direction: str, field: str, value: int) -> Check:
    return lambda flow: getattr(getattr(flow, direction), field) == value


def _status(text: str) -> list[str]:
    """Read `-u ASSURED,!SEEN_REPLY`: all of them."""
    words = []
    for each in text.split(","):
        name = choice(each.removeprefix("!"), STATUSES)
        if name != "UNSET":
            words.append(f"{'not ' if each.startswith('!') else ''}status {name}")
    return words


def _mark(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return number(value, "mark", MARK_MAX), number(mask, "mark", MARK_MAX) if slash else MARK_MAX


def _add_nat(args: argparse.Namespace, checks: list[Check]) -> None:
    if args.any_nat is not None:
        if args.src_nat is not None or args.dst_nat is not None:
            raise OptionError("cannot specify `--src-nat' or `--dst-nat' with `--any-nat'")
        source, target = _nat_check("src", args.any_nat), _nat_check("dst", args.any_nat)
        checks.append(lambda flow: source(flow) or target(flow))
    if args.src_nat is not None:
        checks.append(_nat_check("src", args.src_nat))
    if args.dst_nat is not None:
        checks.append(_nat_check("dst", args.dst_nat))


def _nat_parts(text: str) -> tuple[str, str]:
    """Split 192.0.2.1:80 or [2001:db8::1]:80."""
    if text.startswith("["):
        address, _, rest = text[1:].partition("]")
        return address, rest.removeprefix(":")
    if text.count(":") == 1:
        address, _, port = text.partition(":")
        return address, port
    return text, ""


def _nat_check(side: str, text: str) -> Check:
    """Ask whether one side of a connection is translated, and to the address and port of `text` if it names any."""
    address, port = _nat_parts(text)
    wanted = _address(address) if address else None
    wanted_port = number(port, "port", 0xFFFF) if port else None
    other, own_port, other_port = ("dst", "sport", "dport") if side == "src" else ("src", "dport", "sport")

    def check(flow: api.Flow) -> bool:
        address_now, port_now = getattr(flow.reply, other), getattr(flow.reply, other_port)
        moved: bool = address_now != getattr(flow.orig, side)
        port_moved: bool = port_now != getattr(flow.orig, own_port)
        if wanted is not None and not (moved and ip_address(address_now) == wanted):
            return False
        if wanted_port is not None:
            return port_moved and bool(port_now == wanted_port)
        return moved or port_moved

    return check
