"""`conntrackd flows`: the connections, for people or for scripts."""

import argparse
from collections.abc import Iterator

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, duration, endpoint, json_array, json_lines, table

HEADER = ("PROTO", "STATE", "SOURCE", "DESTINATION", "FLAGS", "TIMEOUT", "PACKETS", "BYTES", "RULE")
HEADER_EXPECTED = ("PROTO", "SOURCE", "DESTINATION", "HELPER", "CLASS", "FLAGS", "TIMEOUT", "MASTER")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("flows", help="list the connections")
    parser.add_argument("-o", "--output", choices=["table", "json", "jsonl"], default="table")
    parser.add_argument("--expected", action="store_true", help="list the connections that helpers expect instead")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """List them; returns the exit code."""
    rows = api.request(api.socket_path(getattr(args, "socket", None)), "expectations" if args.expected else "flows")
    if args.output == "json":
        json_array(rows)
    elif args.output == "jsonl":
        json_lines(rows)
    elif args.expected:
        table(HEADER_EXPECTED, _expected_cells(rows))
    else:
        table(HEADER, _cells(rows))
    return EXIT_OK


def _cells(rows: Iterator[bytes]) -> Iterator[list[str]]:
    decoder = msgspec.json.Decoder(api.Flow)
    for row in rows:
        flow = decoder.decode(row)
        orig, reply = flow.orig, flow.reply
        target = endpoint(orig.dst, orig.dport)
        if orig.type is not msgspec.UNSET:
            target += f" type {orig.type} code {orig.code} id {orig.id}"
        flags = [flag for flag in flow.status if flag not in ("CONFIRMED", "SEEN_REPLY")]
        if "SEEN_REPLY" not in flow.status:
            flags.append("UNREPLIED")
        yield [
            flow.protocol,
            flow.state or "-",
            endpoint(orig.src, orig.sport),
            target,
            ",".join(flags) or "-",
            duration(flow.timeout_seconds),
            f"{orig.packets}/{reply.packets}",
            f"{orig.bytes}/{reply.bytes}",
            flow.rule,
        ]


def _expected_cells(rows: Iterator[bytes]) -> Iterator[list[str]]:
    decoder = msgspec.json.Decoder(api.Expectation)
    for row in rows:
        expected = decoder.decode(row)
        source, port = expected.src or "any", "any" if expected.sport is None else expected.sport
        if expected.srckey is not msgspec.UNSET:
            source, target = f"{source} key {expected.srckey}", f"{expected.dst} key {expected.dstkey}"
        else:
            source, target = f"{source} port {port}", endpoint(expected.dst, expected.dport)
        yield [
            expected.protocol,
            source,
            target,
            expected.helper,
            expected.class_ or "-",
            ",".join(expected.flags) or "-",
            duration(expected.timeout_seconds),
            str(expected.master),
        ]
