"""What the commands that change the policy share: they ask, wait, and say what came of it."""

import argparse
from typing import Any, Final

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE, remark

PATIENCE_S: Final = 300.0  # loading a huge configuration takes its time


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the option that all of them have."""
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")


def change(path: str, command: str, arguments: dict[str, Any], output: str) -> int:
    """Ask for a change and say what came of it; returns 0, 1, or 2 for a configuration with mistakes."""
    from conntrackd.mistakes import ConfigError

    (row,) = api.request(path, command, arguments, PATIENCE_S)
    done = msgspec.json.decode(row, type=api.Change)
    if output == "json":
        print(msgspec.json.format(row).decode())
    else:
        for error in done.errors:
            remark(str(ConfigError(**msgspec.structs.asdict(error))))
        for text in done.remarks:
            remark(text)
        if done.ok:
            print(done.message)
        else:
            remark(done.message)
    if done.ok:
        return EXIT_OK
    return EXIT_USAGE if done.errors else EXIT_FAILED
