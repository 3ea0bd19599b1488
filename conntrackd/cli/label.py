"""`conntrackd label`: the labels of the connections that a filter chooses."""

import argparse

import msgspec

from conntrackd import api
from conntrackd.cli import flowtable
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_OK, Counted, json_array, json_lines, remark, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("label", help="list the labels; give some to connections, or take some away")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the labels that there are")
    listing.add_argument("-o", "--output", choices=["table", "json"], default="table")
    adding = actions.add_parser("add", help="give a label, or some with commas between them, to connections")
    deleting = actions.add_parser("del", help="take it away")
    for at in (adding, deleting):
        at.add_argument("label", type=lambda text: text.split(","), help="a name of [labels], or the number of a bit")
        add_filter(at, required=True)
        at.add_argument("-o", "--output", choices=["table", "json", "jsonl"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do it and show which connections have changed; returns the exit code."""
    path = api.socket_path(getattr(args, "socket", None))
    if args.action == "list":
        rows = api.request(path, "label", {"action": "list"})
        if args.output == "json":
            json_array(rows)
        else:
            labels = (msgspec.json.decode(row, type=api.Label) for row in rows)
            table(("LABEL", "BIT"), ((label.name, str(label.bit)) for label in labels))
        return EXIT_OK
    wanted = {"action": args.action, "labels": args.label, "filter": filter_of(args)}
    changed = Counted(api.request(path, "label", wanted))
    if args.output == "json":
        json_array(changed)
    elif args.output == "jsonl":
        json_lines(changed)
    else:
        table(flowtable.HEADER, map(flowtable.cells, flowtable.decoded(changed)), flowtable.tint)
    remark(f"{changed.count} flow{'' if changed.count == 1 else 's'} changed.")
    return EXIT_OK
