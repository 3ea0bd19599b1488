"""`conntrackd schema`: the JSON Schema of the configuration, for editors."""

import argparse
import json

from conntrackd.cli.output import EXIT_OK


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("schema", help="print the JSON Schema of the configuration, for editors")
    parser.set_defaults(func=run)


def run(_args: argparse.Namespace) -> int:
    """Print it; returns the exit code."""
    from conntrackd.configschema import schema

    print(json.dumps(schema(), indent=2))
    return EXIT_OK
