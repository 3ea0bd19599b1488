"""However a file is broken, the operator gets sentences that point into it, and never a traceback."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from conntrackd import config

EXAMPLE = (Path(__file__).parents[2] / "config" / "conntrackd.toml").read_text()
# What an operator's slip may put in place of something else, and what the grammar of TOML is made of.
GRAMMAR = ["", "[", "]", "{", "}", "[[", "[]", "{}", "=", ".", ",", '"', '""', '"""', "'", "#", "\\", "\n", "\t"]
VALUES = ["ü", "-1", "1.5", "true", "1979-05-27", '"x"', "self", "any", "inf", "0x1", "[1, 'a']", "x = 1\n"]
PIECES = st.sampled_from(GRAMMAR + VALUES)
TOKENS = [token for line in EXAMPLE.splitlines() for token in line.partition("#")[0].split()]


@st.composite
def broken(draw: st.DrawFn) -> str:
    """Put pieces in place of tokens of the example."""
    text = "\n".join(line.partition("#")[0] for line in EXAMPLE.splitlines())
    for _ in range(draw(st.integers(1, 4))):
        token = draw(st.sampled_from(TOKENS))
        at = text.find(token, draw(st.integers(0, len(text) - 1)))
        if at >= 0:
            text = text[:at] + draw(PIECES) + text[at + len(token) :]
    return text


def errors_of(text: str) -> list[config.ConfigError]:
    try:
        config.parse(text.encode(), "test.toml")
    except config.ConfigErrors as errors:
        return errors.errors
    return []


@settings(max_examples=400, deadline=None)
@given(broken())
def test_any_slip_is_reported_at_a_place_of_the_file(text: str) -> None:
    lines = text.split("\n")
    for error in errors_of(text):
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column < error.end_column <= len(lines[error.line - 1]) + 2
        assert error.source == lines[error.line - 1]
        # Every kind of mistake has its own sentence; pydantic's own ones are for programmers.
        assert "Input should" not in error.message
