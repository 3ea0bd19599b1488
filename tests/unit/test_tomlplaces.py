import tomllib

import pytest

from conntrackd.tomlplaces import Span, TomlPlaces

TEXT = """\
version = 1
"qu\\u0065ue".numbers = [0, # two
  1]

[zones]
lan = { interfaces = ["eth1", "ü*"], x.y = 3 } # comment
[zones."w an"]
interfaces = \"\"\"
eth0\"\"\"
[[rule]]
name = "a"
[rule.deep]
q = 1
[[rule]]
	name = 'b'
[[rule.list]]
z = [{ k = 2 }]
""".encode()


def pointed_at(span: Span) -> str:
    return TEXT.decode().split("\n")[span.line - 1][span.column - 1 : span.end_column - 1]


@pytest.mark.parametrize(
    ("path", "line", "text"),
    [
        (("version",), 1, "1"),
        (("queue",), 2, '"qu\\u0065ue"'),
        (("queue", "numbers"), 2, "[0, # two"),
        (("queue", "numbers", 0), 2, "0"),
        (("queue", "numbers", 1), 3, "1"),
        (("zones", "lan"), 6, '{ interfaces = ["eth1", "ü*"], x.y = 3 }'),
        (("zones", "lan", "interfaces", 1), 6, '"ü*"'),
        (("zones", "lan", "x", "y"), 6, "3"),
        (("zones", "w an"), 7, '[zones."w an"]'),
        (("zones", "w an", "interfaces"), 8, '"""'),
        (("rule", 0), 10, "[[rule]]"),
        (("rule", 0, "name"), 11, '"a"'),
        (("rule", 0, "deep", "q"), 13, "1"),
        (("rule", 1, "name"), 15, "'b'"),
        (("rule", 1, "list", 0, "z", 0, "k"), 17, "2"),
    ],
)
def test_value(path: tuple[str | int, ...], line: int, text: str) -> None:
    span = TomlPlaces(TEXT).value(path)
    assert (span.line, pointed_at(span)) == (line, text)


@pytest.mark.parametrize(
    ("path", "line", "text"),
    [
        (("version",), 1, "version"),
        (("queue", "numbers"), 2, "numbers"),
        (("zones", "lan"), 6, "lan"),
        (("zones", "lan", "x", "y"), 6, "y"),
        (("zones", "w an"), 7, '"w an"'),
        (("rule", 1, "name"), 15, "name"),
    ],
)
def test_key(path: tuple[str | int, ...], line: int, text: str) -> None:
    span = TomlPlaces(TEXT).key(path)
    assert (span.line, pointed_at(span)) == (line, text)


def test_a_path_that_leads_out_of_the_text_ends_where_the_text_ends() -> None:
    places = TomlPlaces(TEXT)
    assert places.value(("rule", 1, "action")) == places.value(("rule", 1))
    assert places.value(("nothing",)) == Span(1, 1, 2)


def test_every_value_that_tomllib_reads_has_a_place_of_its_own() -> None:
    places = TomlPlaces(TEXT)
    seen = set()

    def visit(data: object, path: tuple[str | int, ...]) -> int:
        if isinstance(data, dict):
            return sum(visit(inner, (*path, key)) for key, inner in data.items())
        if isinstance(data, list):
            return sum(visit(inner, (*path, index)) for index, inner in enumerate(data))
        seen.add(places.value(path))
        return 1

    assert visit(tomllib.loads(TEXT.decode()), ()) == len(seen) == 11
