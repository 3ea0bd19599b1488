"""How the command line speaks: data on stdout as a table or JSON, remarks on stderr, and the exit codes."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_RUNNING = 3

WIDTH_SAMPLE = 500  # rows that set the widths of a table; rows after them stream


def remark(text: str) -> None:
    """Say something that is not data."""
    print(text, file=sys.stderr)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns. A cell of a late row that is wider than its column moves the rest of its row."""
    stream = iter(rows)
    sample = list(islice(stream, WIDTH_SAMPLE))
    widths = [max(map(len, column)) for column in zip(header, *sample, strict=True)]
    for row in chain([header], sample, stream):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def json_array(rows: Iterator[bytes]) -> None:
    """Print rows that are JSON already as an array, as they come."""
    write = sys.stdout.buffer.write
    sys.stdout.flush()
    separator = b"[\n"
    for row in rows:
        write(separator + row)
        separator = b",\n"
    write(b"[]\n" if separator == b"[\n" else b"\n]\n")


def json_lines(rows: Iterator[bytes]) -> None:
    """Print rows that are JSON already, one a line, as they come."""
    write = sys.stdout.buffer.write
    sys.stdout.flush()
    for row in rows:
        write(row + b"\n")


def duration(seconds: int) -> str:
    """Write a time for people, its two largest units: 4d23h, 1m59s, 7s."""
    units = [("d", 86400), ("h", 3600), ("m", 60), ("s", 1)]
    for index, (unit, size) in enumerate(units):
        if seconds >= size and unit != "s":
            smaller, part = units[index + 1]
            return f"{seconds // size}{unit}{seconds % size // part:02d}{smaller}"
    return f"{seconds}s"


def endpoint(address: str | None, port: object) -> str:
    """Write an address and a port, if it is one: 10.0.0.5:443, [2001:db8::1]:443."""
    if address is None:
        return "-"
    if not isinstance(port, int):
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
