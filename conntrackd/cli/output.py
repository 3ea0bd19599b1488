"""How the command line speaks: data on stdout as a table or JSON, remarks on stderr, and the exit codes."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_RUNNING = 3

BOLD, DIM, RED, GREEN, YELLOW, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"

Row = TypeVar("Row", bound=Sequence[str])

WIDTH_SAMPLE = 500  # rows that set the widths of a table; rows after them stream


def remark(text: str) -> None:
    """Say something that is not data."""
    print(text, file=sys.stderr)


def coloured() -> bool:
    """Whether stdout is a terminal that shows colours, and they are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    """Colour a text where colours are shown."""
    return _painted(text, colour if coloured() else "")


def table(header: Sequence[str], rows: Iterable[Row], tint: Callable[[Row], str] | None = None) -> None:
    """Print rows in columns; on a terminal, in the colours that `tint` chooses."""
    for line in table_lines(header, rows, tint):
        print(line)


def table_lines(header: Sequence[str], rows: Iterable[Row], tint: Callable[[Row], str] | None = None) -> Iterator[str]:
    """Write rows in columns. A cell of a late row that is wider than its column moves the rest of its row."""
    stream = iter(rows)
    sample = list(islice(stream, WIDTH_SAMPLE))
    widths = [max(map(len, column)) for column in zip(header, *sample, strict=True)]
    colour = coloured()
    yield _painted(_line(header, widths), BOLD if colour else "")
    for part in (sample, stream):
        for row in part:
            yield _painted(_line(row, widths), tint(row) if colour and tint is not None else "")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _painted(text: str, colour: str) -> str:
    return f"{colour}{text}{PLAIN}" if colour else text


class Counted(Iterator[bytes]):
    """Rows, and how many have come."""

    def __init__(self, rows: Iterator[bytes]) -> None:
        self.count = 0
        self._rows = rows

    def __next__(self) -> bytes:
        """Give the next row."""
        row = next(self._rows)
        self.count += 1
        return row


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


def ago(moment: str | None) -> str:
    """Write how long ago a moment was, given as the daemon writes it (RFC 3339); None: never."""
    from datetime import UTC, datetime

    if moment is None:
        return "never"
    since = datetime.now(UTC) - datetime.fromisoformat(moment)
    return f"{duration(max(0, int(since.total_seconds())))} ago"


def endpoint(address: str | None, port: object) -> str:
    """Write an address and a port, if it is one: 10.0.0.5:443, [2001:db8::1]:443."""
    if address is None:
        return "-"
    if not isinstance(port, int):
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
