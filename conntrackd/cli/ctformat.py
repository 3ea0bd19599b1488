"""The formats of conntrack(8), made from the rows of the control socket.

Byte for byte they are those of conntrack-tools 1.4.7 on a kernel with nf_conntrack_acct and nf_conntrack_timestamp set;
docs/ct.md lists the differences, all of them deliberate. A row is first turned into what the kernel's message about the
same connection would carry, for that decides what is printed; each format is one function of such a message.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from ipaddress import IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

from msgspec import UNSET

from conntrackd import api

LABELS_MAX: Final = 128

XML_HEAD: Final = '<?xml version="1.0" encoding="utf-8"?>\n<conntrack>'
XML_END: Final = "</conntrack>"

L3_NUMBERS: Final = {"ipv4": 2, "ipv6": 10}
IPPROTO_DCCP: Final = 33
# Those whose names and ports libnetfilter_conntrack knows; every other protocol is "unknown" and has addresses only.
PROTOCOLS: Final = ("icmp", "tcp", "udp", "dccp", "gre", "icmpv6", "sctp", "udplite")
EVENT_TAGS: Final = {"NEW": "    [NEW] ", "UPDATE": " [UPDATE] ", "DESTROY": "[DESTROY] "}
SAVE_COMMANDS: Final = {"NEW": "-A", "UPDATE": "-U", "DESTROY": "-D"}
SAVED_STATUS: Final = ("EXPECTED", "SEEN_REPLY", "ASSURED", "FIXED_TIMEOUT")  # in the order of their bits
# The numbers of the classes that helpers name.
EXPECT_CLASSES: Final = {"signalling": 0, "audio": 1, "video": 2, "image": 3}


class Show(NamedTuple):
    """What is printed besides what always is (-o)."""

    extended: bool = False
    id: bool = False
    timestamp: bool = False  # of events: when they happened
    ktimestamp: bool = False
    labels: Mapping[str, str] | None = None  # names, by those that the daemon has for them; None: no labels


class Message(NamedTuple):
    """What a message of the kernel carries about a connection. None: it does not say."""

    flow: api.Flow
    type: str | None  # of an event; None: a row of the table
    timeout: int | None
    state: str | None
    counters: bool
    mark: int | None
    age: int | None
    start: float | None  # by the wall clock, as the two below
    stop: float | None
    when: float | None
    helper: str | None
    use: bool
    labels: list[str] | None
    by_user: bool


def of_flow(flow: api.Flow, now: float) -> Message:
    """Turn a row of the table into the message of a dump."""
    return Message(
        flow=flow,
        type=None,
        timeout=flow.timeout_seconds,
        state=flow.state,
        counters=True,
        mark=flow.mark,
        age=flow.age_seconds,
        start=now - flow.age_seconds,
        stop=None,
        when=None,
        helper=flow.helper,
        use=True,
        labels=_labels(flow),
        by_user=False,
    )


def of_event(event: api.Event) -> Message:
    """Turn an event into its message [ctnetlink_conntrack_event]: what has changed, and at the end the totals."""
    flow, changes = event.flow, event.changes
    when = datetime.fromisoformat(event.time).timestamp()
    destroyed = event.type == "DESTROY"
    return Message(
        flow=flow,
        type=event.type,
        timeout=None if destroyed and not flow.timeout_seconds else flow.timeout_seconds,
        state=flow.state if event.type != "UPDATE" or "PROTOINFO" in changes else None,
        counters=destroyed,
        mark=flow.mark if flow.mark or "MARK" in changes else None,
        age=flow.age_seconds if destroyed else None,
        start=when - flow.age_seconds if destroyed else None,
        stop=when if destroyed else None,
        when=when,
        helper=None if destroyed else flow.helper,
        use=False,
        labels=_labels(flow) if "LABEL" in changes else None,
        by_user=event.reason == "killed",
    )


def _labels(flow: api.Flow) -> list[str] | None:
    return flow.labels if isinstance(flow.labels, list) else None


def text(message: Message, show: Show) -> str:
    """Write the line of a connection, plain or extended."""
    flow = message.flow
    words = [_protocol_column(flow)]
    if message.timeout is not None:
        words.append(str(message.timeout))
    if message.state is not None:
        words.append(message.state)
    words.append(_tuple_text(flow.protonum, flow.orig, message.counters))
    if "SEEN_REPLY" not in flow.status:
        words.append("[UNREPLIED]")
    words.append(_tuple_text(flow.protonum, flow.reply, message.counters))
    if "ASSURED" in flow.status:
        words.append("[ASSURED]")
    if message.mark is not None:
        words.append(f"mark={message.mark}")
    if flow.zone:
        words.append(f"zone={flow.zone}")
    if message.age is not None:
        words.append(f"delta-time={message.age}")
    if show.ktimestamp and message.start is not None:
        words.append(f"[start={time.ctime(message.start)}]")
    if show.ktimestamp and message.stop is not None:
        words.append(f"[stop={time.ctime(message.stop)}]")
    if message.helper is not None:
        words.append(f"helper={message.helper}")
    if message.use:
        words.append("use=1")
    if show.id:
        words.append(f"id={flow.id}")
    if show.labels is not None and message.labels is not None:
        words.append("labels=" + ",".join(_label_names(message.labels, show.labels)))
    if message.by_user:
        words.append("[USERSPACE]")
    layer3 = f"{flow.family:<8} {L3_NUMBERS[flow.family]} " if show.extended else ""
    tag = EVENT_TAGS[message.type] if message.type is not None else ""
    stamp = f"[{message.when:.6f}]\t" if show.timestamp and message.when is not None else ""
    return stamp + tag + layer3 + " ".join(words)


def _protocol_name(protonum: int, name: str) -> str:
    if protonum == IPPROTO_DCCP:
        return "dccp"
    return name if name in PROTOCOLS else "unknown"


def _protocol_column(flow: api.Flow) -> str:
    return f"{_protocol_name(flow.protonum, flow.protocol):<8} {flow.protonum}"


def _tuple_text(protonum: int, ends: api.Direction, counters: bool) -> str:
    line = f"src={ends.src} dst={ends.dst}"
    for name, value in _ports(protonum, ends):
        line += f" {name}={value}"
    if counters:
        line += f" packets={ends.packets} bytes={ends.bytes}"
    return line


def _ports(protonum: int, ends: api.Direction) -> list[tuple[str, str]]:
    """List what a tuple has besides its addresses, as it is printed."""
    if ends.sport is not UNSET:
        return [("sport", str(ends.sport)), ("dport", str(ends.dport))]
    if ends.type is not UNSET:
        return [("type", str(ends.type)), ("code", str(ends.code)), ("id", str(ends.id))]
    if isinstance(ends.srckey, int) and isinstance(ends.dstkey, int):
        return [("srckey", f"{ends.srckey:#x}"), ("dstkey", f"{ends.dstkey:#x}")]
    if protonum == IPPROTO_DCCP:
        return [("sport", "0"), ("dport", "0")]  # the tool knows its ports, the kernel does not track them any more
    return []


def save(message: Message, command: str = "") -> str:
    """Write the options that would make this connection anew (-o save); `conntrack -R` reads them."""
    flow, orig, reply = message.flow, message.flow.orig, message.flow.reply
    status = ",".join(name for name in SAVED_STATUS if name in flow.status)
    words = [command or SAVE_COMMANDS[message.type or "NEW"]]
    if message.timeout is not None:
        words.append(f"-t {message.timeout}")
    words.append(f"-u {status or 'UNSET'}")
    if message.mark:
        words.append(f"-m {message.mark}")
    if flow.zone:
        words.append(f"-w {flow.zone}")
    words += [
        f"-s {orig.src} -d {orig.dst}",
        f"{'-r' if reply.src == orig.dst else '-g'} {reply.src}",
        f"{'-q' if reply.dst == orig.src else '-n'} {reply.dst}",
    ]
    name = _protocol_name(flow.protonum, flow.protocol)
    words.append(f"-p {flow.protonum if name == 'unknown' else name}")
    if orig.sport is not UNSET:
        words += [f"--sport {orig.sport} --dport {orig.dport}"]
        words += [f"--reply-port-src {reply.sport} --reply-port-dst {reply.dport}"]
    elif orig.type is not UNSET:
        words += [f"--{flow.protocol}-{name} {value}" for name, value in _ports(flow.protonum, orig)]
    elif orig.srckey is not UNSET:
        words += [f"--srckey {orig.srckey} --dstkey {orig.dstkey}"]
        words += [f"--reply-key-src {reply.srckey} --reply-key-dst {reply.dstkey}"]
    if message.state is not None:
        words.append(f"--state {message.state}")
        if isinstance(orig.vtag, int) and isinstance(reply.vtag, int):
            words.append(f"--orig-vtag {_swapped(orig.vtag)} --reply-vtag {_swapped(reply.vtag)}")
    return " ".join(words)


def _swapped(vtag: int) -> int:
    """Turn a verification tag round: conntrack(8) reads and writes them with their bytes in the wrong order."""
    return int.from_bytes(vtag.to_bytes(4, "big"), "little")


def xml(message: Message, show: Show) -> str:
    """Write the element of a connection (-o xml)."""
    flow = message.flow
    kind = f' type="{message.type.lower()}"' if message.type is not None else ""
    facts = [
        _element("state", message.state),
        _element("timeout", message.timeout),
        _element("mark", message.mark),
        _labels_xml(message, show),
        _element("zone", flow.zone or None),
        _element("use", 1 if message.use else None),
        _element("id", flow.id),
        "<assured/>" if "ASSURED" in flow.status else "",
        "" if "SEEN_REPLY" in flow.status else "<unreplied/>",
        _timestamps_xml(message) if show.ktimestamp else "",
        _element("deltatime", message.age),
    ]
    return (
        f"<flow{kind}>"
        + _tuple_xml("original", flow, flow.orig, message.counters)
        + _tuple_xml("reply", flow, flow.reply, message.counters)
        + f'<meta direction="independent">{"".join(facts)}</meta>'
        + (_when_xml(message.when) if show.timestamp and message.when is not None else "")
        + _element("helper", message.helper)
        + "</flow>"
    )


def lines(flows: Iterable[api.Flow], output: str, now: float) -> Iterator[str]:
    """Write connections as conntrack, extended, save or xml; xml is a whole document, even of none."""
    show = Show(extended=output == "extended")
    if output == "xml":
        yield XML_HEAD
    for message in (of_flow(flow, now) for flow in flows):
        if output == "xml":
            yield xml(message, show)
        else:
            yield save(message) if output == "save" else text(message, show)
    if output == "xml":
        yield XML_END


def _element(name: str, value: object) -> str:
    return "" if value is None else f"<{name}>{value}</{name}>"


def _tuple_xml(direction: str, flow: api.Flow, ends: api.Direction, counters: bool) -> str:
    l4 = f'<layer4 protonum="{flow.protonum}" protoname="{_protocol_name(flow.protonum, flow.protocol)}">'
    ports = "".join(_element(name, value) for name, value in _ports(flow.protonum, ends))
    counted = f"<counters><packets>{ends.packets}</packets><bytes>{ends.bytes}</bytes></counters>" if counters else ""
    return (
        f'<meta direction="{direction}"><layer3 protonum="{L3_NUMBERS[flow.family]}" protoname="{flow.family}">'
        f"<src>{ends.src}</src><dst>{ends.dst}</dst></layer3>{l4}{ports}</layer4>{counted}</meta>"
    )


def _labels_xml(message: Message, show: Show) -> str:
    if show.labels is None or message.labels is None:
        return ""
    names = _label_names(message.labels, show.labels)
    return "<labels>" + "".join(_element("label", name) for name in names) + "</labels>"


def _timestamps_xml(message: Message) -> str:
    """Write the times in nanoseconds, as the kernel does."""
    times = [
        _element(name, None if at is None else round(at * 1000) * 1_000_000)
        for name, at in (("start", message.start), ("stop", message.stop))
    ]
    return f"<timestamp>{''.join(times)}</timestamp>" if any(times) else ""


def _when_xml(when: float) -> str:
    at = time.localtime(when)
    return (
        f"<when><hour>{at.tm_hour}</hour><min>{at.tm_min:02}</min><sec>{at.tm_sec:02}</sec>"
        f"<wday>{(at.tm_wday + 1) % 7 + 1}</wday><day>{at.tm_mday}</day><month>{at.tm_mon}</month>"
        f"<year>{at.tm_year}</year></when>"
    )


def expectation(expected: api.Expectation, master: api.Flow) -> str:
    """Write the line of an expectation (-L expect)."""
    words = [f"{expected.timeout_seconds} proto={expected.protonum}"]
    words += [" ".join(part) for part in _expectation_tuples(expected, master)]
    if expected.zone:
        words.append(f"zone={expected.zone}")
    if expected.flags:
        words.append(",".join(expected.flags))
    words.append(f"class={EXPECT_CLASSES.get(expected.class_ or '', 0)} helper={expected.helper}")
    return " ".join(words)


def _expectation_tuples(expected: api.Expectation, master: api.Flow) -> Iterator[list[str]]:
    """Spell out what is expected, the mask over it, and by whom it was announced."""
    source, mask = _source(expected)
    all_ones = str(ip_network(f"{expected.dst}").netmask)
    ends = api.Direction(src=source, dst=expected.dst, packets=0, bytes=0)
    masks = api.Direction(src=mask, dst=all_ones, packets=0, bytes=0)
    if isinstance(expected.srckey, int):
        ends.srckey, ends.dstkey = expected.srckey, expected.dstkey
        masks.srckey = masks.dstkey = 0xFFFF
    elif isinstance(expected.dport, int):
        ends.sport, ends.dport = expected.sport or 0, expected.dport
        masks.sport, masks.dport = 0 if expected.sport is None else 0xFFFF, 0xFFFF
    for prefix, protonum, each in (
        ("", expected.protonum, ends),
        ("mask-", expected.protonum, masks),
        ("master-", master.protonum, master.orig),
    ):
        ports = [f"{name}={value}" for name, value in _ports(protonum, each)]
        yield [f"{prefix}src={each.src}", f"{prefix}dst={each.dst}", *ports]


def _source(expected: api.Expectation) -> tuple[str, str]:
    """Tell the source address of an expectation and its mask."""
    network = ip_network(expected.src or ("::/0" if expected.family == "ipv6" else "0.0.0.0/0"))
    mask = ip_address(int(network.netmask)) if isinstance(network, IPv6Network) else network.netmask
    return str(network.network_address), str(mask)


def _label_names(labels: list[str], names: Mapping[str, str]) -> Iterator[str]:
    return (names[label] for label in labels if label in names)


def read_labels(path: str) -> dict[int, str]:
    """Read the names of labels by bit: a number and a name a line. OSError if there is no such file."""
    names = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.partition("#")[0].split(maxsplit=1)
            if len(words) == 2 and words[0].isdecimal() and int(words[0]) < LABELS_MAX:
                names[int(words[0])] = words[1].strip()
    return names
