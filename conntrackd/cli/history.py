"""`conntrackd history`: the generations of the policy, who made them and when; or the files of one of them."""

import argparse
from datetime import datetime

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, json_array, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("history", help="list the generations of the policy, or print the files of one")
    parser.add_argument("generation", nargs="?", type=int, help="print the configuration files of this one")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """List them, the oldest first; returns the exit code."""
    path = api.socket_path(getattr(args, "socket", None))
    if args.generation is not None:
        texts = [
            msgspec.json.decode(row, type=api.SourceText)
            for row in api.request(path, "config", {"generation": args.generation})
        ]
        for file in texts:
            if len(texts) > 1:
                print(f"# {file.name}")
            print(file.text, end="" if file.text.endswith("\n") else "\n")
        return EXIT_OK
    rows = api.request(path, "history")
    if args.output == "json":
        json_array(rows)
        return EXIT_OK
    decoded = [msgspec.json.decode(row, type=api.GenerationRow) for row in rows]
    table(
        ("GENERATION", "TIME", "HOW", "WHO", "RULES", "FILE", "STATE"),
        [
            (
                str(row.generation),
                datetime.fromisoformat(row.time).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                row.how,
                row.who,
                str(row.rules),
                row.file,
                row.state,
            )
            for row in decoded
        ],
    )
    return EXIT_OK
