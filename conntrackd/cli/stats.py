"""`conntrackd stats`: the counters."""

import argparse

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("stats", help="show the counters")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show them; returns the exit code. For people, what never happened is left out."""
    (row,) = api.request(api.socket_path(getattr(args, "socket", None)), "stats")
    if args.output == "json":
        print(msgspec.json.format(row).decode())
        return EXIT_OK
    stats = msgspec.json.decode(row, type=api.Stats)
    counters = {name: getattr(stats, name) for name in stats.__struct_fields__}
    tracker = {name: count for name, count in counters.items() if isinstance(count, int)}
    for title, counts in (
        ("TRACKER", tracker),
        ("ENDED", stats.closed),
        ("PACKETS", stats.ctinfo),
        ("DROPPED", stats.drops),
        ("FAULTS", stats.faults),
    ):
        table((title, "COUNT"), [(name, str(count)) for name, count in counts.items() if count])
        print()
    table(("RULE", "ACTION", "HITS"), [(rule.name, rule.action, str(rule.hits)) for rule in stats.rules])
    return EXIT_OK
