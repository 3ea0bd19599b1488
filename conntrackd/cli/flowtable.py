"""Flows for people: as rows of a table, in an order, and counted in groups."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

import msgspec

from conntrackd import api
from conntrackd.cli.output import DIM, YELLOW, duration, endpoint

HEADER = ("PROTO", "STATE", "SOURCE", "DESTINATION", "FLAGS", "TIMEOUT", "PACKETS", "BYTES", "RULE")
STATE, FLAGS = HEADER.index("STATE"), HEADER.index("FLAGS")
ENDING = ("FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "CLOSED")


def decoded(rows: Iterable[bytes]) -> Iterator[api.Flow]:
    """Read the rows of an answer."""
    return map(msgspec.json.Decoder(api.Flow).decode, rows)


def cells(flow: api.Flow) -> list[str]:
    """Write a flow as a row under HEADER."""
    orig, reply = flow.orig, flow.reply
    target = endpoint(orig.dst, orig.dport)
    if orig.type is not msgspec.UNSET:
        target += f" type {orig.type} code {orig.code} id {orig.id}"
    flags = [flag for flag in flow.status if flag not in ("CONFIRMED", "SEEN_REPLY", "DYING")]
    if "SEEN_REPLY" not in flow.status:
        flags.append("UNREPLIED")
    return [
        flow.protocol,
        flow.state or "-",
        endpoint(orig.src, orig.sport),
        target,
        ",".join(flags) or "-",
        duration(flow.timeout_seconds),
        f"{orig.packets}/{reply.packets}",
        f"{orig.bytes}/{reply.bytes}",
        f"{flow.rule} {labels(flow)}".rstrip(),
    ]


def labels(flow: api.Flow) -> str:
    """Write the labels of a flow as conntrack(8) does; "" if it has none."""
    return f"labels={','.join(flow.labels)}" if isinstance(flow.labels, list) else ""


def tint(row: list[str]) -> str:
    """Choose the colour of a row: what nobody has answered stands out, what is ending stands back."""
    if "UNREPLIED" in row[FLAGS]:
        return YELLOW
    return DIM if row[STATE] in ENDING else ""


# --- Order --------------------------------------------------------------------------------------------------------


def _bytes(flow: api.Flow) -> int:
    return flow.orig.bytes + flow.reply.bytes


def _packets(flow: api.Flow) -> int:
    return flow.orig.packets + flow.reply.packets


def _address(text: str) -> tuple[int, bytes]:
    return (6, inet_pton(AF_INET6, text)) if ":" in text else (4, inet_pton(AF_INET, text))


def _port(port: object) -> int:
    return port if isinstance(port, int) else -1


# Amounts are shown with the largest first, everything else in ascending order.
AMOUNTS: dict[str, Callable[[api.Flow], int]] = {
    "bytes": _bytes,
    "packets": _packets,
    "age": lambda flow: flow.age_seconds,
    "idle": lambda flow: flow.idle_seconds or 0,
    "timeout": lambda flow: flow.timeout_seconds,
}
SORTS: dict[str, Callable[[api.Flow], Any]] = AMOUNTS | {
    "src": lambda flow: (_address(flow.orig.src), _port(flow.orig.sport)),
    "dst": lambda flow: (_address(flow.orig.dst), _port(flow.orig.dport)),
    "protocol": lambda flow: flow.protonum,
    "state": lambda flow: flow.state or "",
    "rule": lambda flow: flow.rule,
    "zone": lambda flow: flow.zone,
    "mark": lambda flow: flow.mark,
    "id": lambda flow: flow.id,
}


def ordered(rows: Iterator[bytes], sort: str | None, reverse: bool, limit: int | None) -> Iterator[bytes]:
    """Put rows in order, and take the first `limit`. Without an order they stream; else only the limit is kept."""
    if sort is None:
        return islice(rows, limit)
    key = SORTS[sort]
    keyed = ((key(flow), row) for row, flow in _with_flows(rows))
    largest = reverse != (sort in AMOUNTS)
    if limit is None:
        return (row for _, row in sorted(keyed, key=_first, reverse=largest))
    best = heapq.nlargest(limit, keyed, key=_first) if largest else heapq.nsmallest(limit, keyed, key=_first)
    return (row for _, row in best)


def _with_flows(rows: Iterator[bytes]) -> Iterator[tuple[bytes, api.Flow]]:
    decode = msgspec.json.Decoder(api.Flow).decode
    for row in rows:
        yield row, decode(row)


def _first(pair: tuple[Any, bytes]) -> Any:
    return pair[0]


# --- Groups -------------------------------------------------------------------------------------------------------

HEADER_GROUPS = ("FLOWS", "PACKETS", "BYTES")


def _service(flow: api.Flow) -> str:
    """Name what a flow is for as the policy does: tcp/443, icmp/8."""
    for number in (flow.orig.dport, flow.orig.type):
        if isinstance(number, int):
            return f"{flow.protocol}/{number}"
    return flow.protocol


GROUPS: dict[str, Callable[[api.Flow], str]] = {
    "src": lambda flow: flow.orig.src,
    "dst": lambda flow: flow.orig.dst,
    "rule": lambda flow: flow.rule,
    "state": lambda flow: flow.state or "-",
    "service": _service,
}
GROUP_SORTS: dict[str, Callable[[api.Group], Any]] = {
    "count": lambda group: (-group.count, group.key),
    "packets": lambda group: (-group.packets, group.key),
    "bytes": lambda group: (-group.bytes, group.key),
    "key": lambda group: group.key,
}


def grouped(flows: Iterable[api.Flow], by: str) -> list[api.Group]:
    """Count flows, packets and bytes by what `by` says."""
    name = GROUPS[by]
    groups: dict[str, api.Group] = {}
    for flow in flows:
        key = name(flow)
        group = groups.get(key)
        if group is None:
            group = groups[key] = api.Group(by, key, 0, 0, 0)
        group.count += 1
        group.packets += _packets(flow)
        group.bytes += _bytes(flow)
    return list(groups.values())
