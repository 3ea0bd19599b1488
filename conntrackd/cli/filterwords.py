"""FILTER on the command line: its words, quoted as one or as they are."""

import argparse


def add_filter(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the argument."""
    parser.add_argument(
        "filter",
        nargs="+" if required else "*",
        metavar="FILTER",
        help="which connections, as 'tcp and dst port 443 and src net 10.0.0.0/8' (docs/filter.md)"
        + ("; `all` is all of them" if required else ""),
    )


def filter_of(args: argparse.Namespace) -> str:
    """Read the filter and check it, before anybody is asked. Raises FilterError."""
    text = " ".join(args.filter)
    if text:
        from conntrackd.filter import parse

        parse(text)
    return text
