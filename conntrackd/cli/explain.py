"""`conntrackd explain`: which rule decides about a packet, and why the others do not. Nothing is sent."""

import argparse
from typing import TYPE_CHECKING

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, EXIT_USAGE, json_array, remark

if TYPE_CHECKING:
    from conntrackd.policy.ruleset import Ruleset


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("explain", help="say which rule decides about a packet, and why; nothing is sent")
    parser.add_argument(
        "packet",
        nargs="+",
        help="as 'tcp 10.0.0.5:1234 > 1.1.1.1:443 in lan out wan', in quotes or without the `>`. `in` and `out` are a "
        "zone or an interface; left out, they are where the router's routes lead. `state related` or `state invalid` "
        "behind it asks for these",
    )
    parser.add_argument("--config", metavar="FILE", help="ask this file, not the running daemon")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Say it; returns the exit code."""
    if args.config is not None:
        return _offline(args)
    rows = api.request(api.socket_path(getattr(args, "socket", None)), "explain", {"packet": " ".join(args.packet)})
    if args.output == "json":
        json_array(rows)
        return EXIT_OK
    _print([msgspec.json.decode(row, type=api.ExplainStep) for row in rows])
    return EXIT_OK


def _offline(args: argparse.Namespace) -> int:
    from conntrackd import config
    from conntrackd.policy.compile import compile as compile_ruleset
    from conntrackd.policy.explain import ExplainError, explain, parse

    try:
        ruleset = compile_ruleset(config.load(args.config), 1)
        packet = parse(" ".join(args.packet))
        zones = [_zone(ruleset, "in", packet.way_in), _zone(ruleset, "out", packet.way_out)]
    except (config.ConfigErrors, ExplainError) as error:
        remark(str(error))
        return EXIT_USAGE
    steps = [api.ExplainStep(*step) for step in explain(ruleset, packet, zones[0], zones[1], 0)]
    if args.output == "json":
        json_array(map(msgspec.json.encode, steps))
    else:
        _print(steps)
    return EXIT_OK


def _zone(ruleset: "Ruleset", way: str, name: str) -> int:
    from conntrackd.mistakes import any_of
    from conntrackd.policy.explain import ExplainError

    if name in ruleset.zones:
        return ruleset.zones[name]
    what = f"There is no zone {name!r}" if name else f"Say `{way} ZONE`"
    raise ExplainError(f"{what} (expected {any_of(list(ruleset.zones))}).")


def _print(steps: list[api.ExplainStep]) -> None:
    for step in steps:
        print(f"{'=>' if step.matches else '  '} {step.rule} ({step.action}): {step.why}")
