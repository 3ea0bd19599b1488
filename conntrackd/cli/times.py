"""Times on the command line: 30s, 5m, 500ms."""

import argparse
import re

UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Read a time, as an argument's type."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time (expected as 30s, 5m or 500ms)")
    return float(found[1]) * UNITS[found[2] or ""]
