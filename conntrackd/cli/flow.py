"""`conntrackd flow`: everything about one connection."""

import argparse
from collections.abc import Iterator
from datetime import datetime

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, duration, endpoint, remark


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("flow", help="show everything about one connection")
    parser.add_argument("id", type=_id, metavar="ID", help="as `flows -o json` and `events -o json` show it")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show it; returns the exit code."""
    rows = list(api.request(api.socket_path(getattr(args, "socket", None)), "flow", {"id": args.id}))
    if not rows:
        remark(f"There is no flow {args.id}: it has ended, or never was.")
        return EXIT_FAILED
    if args.output == "json":
        print(msgspec.json.format(rows[0]).decode())
        return EXIT_OK
    lines = list(_lines(msgspec.json.decode(rows[0], type=api.FlowDetails)))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    return EXIT_OK


def _lines(flow: api.FlowDetails) -> Iterator[tuple[str, str]]:
    """Write what there is to say, by name."""
    yield "flow", str(flow.id)
    yield "protocol", f"{flow.protocol} ({flow.protonum}), {flow.family}"
    if flow.state is not None:
        yield "state", flow.state + (f", ending by {flow.ending}" if flow.ending else "")
    yield "status", ", ".join(flow.status)
    for name, direction in ("orig", flow.orig), ("reply", flow.reply):
        yield name, f"{_tuple(direction)}: {direction.packets} packets, {direction.bytes} bytes"
    yield "admitted by", f"rule {flow.rule} of generation {flow.generation}"
    yield "interfaces", f"in {flow.in_ or 'self'}, out {flow.out or 'self'}"
    yield "begun", f"{_local(flow.begun)}, {duration(flow.age_seconds)} ago"
    yield "last packet", _local(flow.last_packet)
    yield "ends", f"in {duration(flow.timeout_seconds)}" + (", by timeouts of its rule" if flow.own_timeouts else "")
    yield "mark", f"{flow.mark:#x}"
    if flow.zone:
        yield "zone", str(flow.zone)
    if isinstance(flow.labels, list):
        yield "labels", ", ".join(flow.labels)
    if flow.helper is not None:
        yield "helper", flow.helper
    if flow.master is not None:
        yield "announced by", f"flow {flow.master}"
    if flow.children:
        yield "has announced", ", ".join(f"flow {child}" for child in flow.children)
    for expected in flow.expected:
        target = endpoint(expected.dst, expected.dport)
        yield (
            "expects",
            f"{expected.protocol} {expected.src or 'any'} > {target}, for {duration(expected.timeout_seconds)}",
        )
    if isinstance(flow.tcp, api.TcpDetails):
        for name, side in ("tcp orig", flow.tcp.orig), ("tcp reply", flow.tcp.reply):
            flags = "".join(f", {flag}" for flag in side.flags)
            yield (
                name,
                f"end {side.end}, may send to {side.max_end}, window {side.max_window}, scale {side.scale}{flags}",
            )
    if isinstance(flow.orig.vtag, int):
        yield "sctp", f"tags {flow.orig.vtag:#x}, {flow.reply.vtag:#x}"


def _tuple(direction: api.Direction) -> str:
    parts = f"{endpoint(direction.src, direction.sport)} > {endpoint(direction.dst, direction.dport)}"
    if isinstance(direction.type, int):
        parts += f" type {direction.type} code {direction.code} id {direction.id}"
    if isinstance(direction.srckey, int):
        parts += f" keys {direction.srckey}, {direction.dstkey}"
    return parts


def _local(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is no id of a flow (a number, as `flows -o json` shows it)")
    return int(text)
