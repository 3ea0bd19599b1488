"""Where keys and values stand in a TOML text, so that a complaint can point at them.

tomllib hands out data without places; tree-sitter reads the same text again, only when there is a complaint.
A path is as pydantic's: ("rule", 3, "action") is the key `action` of the fourth [[rule]].
"""

import tomllib
from collections.abc import Sequence
from typing import NamedTuple

import tree_sitter_toml
from tree_sitter import Language, Node, Parser


class Span(NamedTuple):
    """A piece of one line, counted in characters from 1; `end_column` is the first one behind it."""

    line: int
    column: int
    end_column: int


class Place:
    """A key, its value, and the places of what the value holds by key or by index."""

    def __init__(self, key: Node, value: Node) -> None:
        self.key = key
        self.value = value
        self.inside: dict[str | int, Place] = {}


class TomlPlaces:
    """The places of one text, which must be valid TOML."""

    def __init__(self, source: bytes) -> None:
        self._lines = source.split(b"\n")
        text = Parser(Language(tree_sitter_toml.language())).parse(source).root_node
        self._root = Place(text, text)
        for node in text.named_children:
            if node.type == "pair":
                _add_pair(self._root, node)
            elif node.type in ("table", "table_array_element"):
                _add_table(self._root, node)

    def key(self, path: Sequence[str | int]) -> Span:
        """Find the key at the end of the path, or of the part of the path that the text has."""
        return self._span(self._find(path).key)

    def value(self, path: Sequence[str | int]) -> Span:
        """Find the value at the end of the path, or of the part of the path that the text has."""
        return self._span(self._find(path).value)

    def _find(self, path: Sequence[str | int]) -> Place:
        place = self._root
        for step in path:
            if step not in place.inside:
                break
            place = place.inside[step]
        return place

    def _span(self, node: Node) -> Span:
        if node is self._root.key:
            return Span(1, 1, 2)  # the whole text: point at its beginning
        (row, start), (end_row, end) = node.start_point, node.end_point
        line = self._lines[row].rstrip(b"\r")
        if end_row > row:
            end = len(line)
        return Span(row + 1, _characters(line[:start]) + 1, _characters(line[:end]) + 1)


def _characters(raw: bytes) -> int:
    """Count characters: tree-sitter counts bytes."""
    return len(raw.decode(errors="replace"))


def _add_table(root: Place, node: Node) -> None:
    """Add a [table] or one element of a [[list of tables]] with its pairs."""
    header, *pairs = node.named_children
    *parents, last = _key_parts(header)
    place = root
    for part in parents:
        place = _latest(_enter(place, part, part))
    place = _enter(place, last, node)
    if node.type == "table_array_element":
        element = Place(node, node)
        place.inside[len(place.inside)] = element
        place = element
    for pair in pairs:
        if pair.type == "pair":
            _add_pair(place, pair)


def _add_pair(table: Place, pair: Node) -> None:
    key, value = pair.named_children[:2]  # a comment may follow
    *parents, last = _key_parts(key)
    for part in parents:
        table = _enter(table, part, part)
    place = _enter(table, last, value)
    _add_value(place, value)


def _add_value(place: Place, value: Node) -> None:
    if value.type == "inline_table":
        for pair in value.named_children:
            if pair.type == "pair":
                _add_pair(place, pair)
    elif value.type == "array":
        entries = [entry for entry in value.named_children if entry.type != "comment"]
        for index, entry in enumerate(entries):
            place.inside[index] = Place(entry, entry)
            _add_value(place.inside[index], entry)


def _enter(table: Place, key: Node, value: Node) -> Place:
    """Return the place of a key in a table; it is made when the key was not met before."""
    return table.inside.setdefault(_key_text(key), Place(key, value))


def _latest(place: Place) -> Place:
    """Return the last element of a list of tables, which is what a header below it speaks of."""
    while place.inside and all(isinstance(step, int) for step in place.inside):
        place = place.inside[len(place.inside) - 1]
    return place


def _key_parts(key: Node) -> list[Node]:
    if key.type != "dotted_key":
        return [key]
    return [leaf for part in key.named_children for leaf in _key_parts(part)]


def _key_text(key: Node) -> str:
    text = (key.text or b"").decode()
    if key.type == "quoted_key":
        return next(iter(tomllib.loads(text + " = 0")))
    return text
