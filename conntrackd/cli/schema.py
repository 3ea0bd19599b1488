"""`conntrackd schema`: the JSON Schema of the configuration, for editors, or of what a command prints, for programs."""

import argparse
import json

from conntrackd.apischema import OUTPUTS
from conntrackd.apischema import schema as output_schema
from conntrackd.cli.output import EXIT_OK


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "schema", help="print the JSON Schema of the configuration, or of a command's output"
    )
    parser.add_argument(
        "output",
        nargs="?",
        choices=list(OUTPUTS),
        metavar="COMMAND",
        help="of what this prints with `-o json`, in one word: %(choices)s (default: of the configuration)",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print it; returns the exit code."""
    if args.output is not None:
        made = output_schema(args.output)
    else:
        from conntrackd.configschema import schema

        made = schema()
    print(json.dumps(made, indent=2))
    return EXIT_OK
