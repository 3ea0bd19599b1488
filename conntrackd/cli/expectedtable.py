"""Expectations for people: as rows of a table."""

from collections.abc import Iterable, Iterator

import msgspec

from conntrackd import api
from conntrackd.cli.output import duration, endpoint

HEADER = ("PROTO", "SOURCE", "DESTINATION", "HELPER", "CLASS", "FLAGS", "TIMEOUT", "MASTER")


def rows(encoded: Iterable[bytes]) -> Iterator[list[str]]:
    """Read the rows of an answer and write them under HEADER."""
    return map(cells, map(msgspec.json.Decoder(api.Expectation).decode, encoded))


def cells(expected: api.Expectation) -> list[str]:
    """Write an expectation as a row."""
    source, target = ends(expected)
    return [
        expected.protocol,
        source,
        target,
        expected.helper,
        expected.class_ or "-",
        ",".join(expected.flags) or "-",
        duration(expected.timeout_seconds),
        str(expected.master),
    ]


def ends(expected: api.Expectation) -> tuple[str, str]:
    """Write where the expected connection may come from, and where it goes."""
    source, port = expected.src or "any", "any" if expected.sport is None else expected.sport
    if expected.srckey is not msgspec.UNSET:
        return f"{source} key {expected.srckey}", f"{expected.dst} key {expected.dstkey}"
    return f"{source} port {port}", endpoint(expected.dst, expected.dport)
