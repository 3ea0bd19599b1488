"""What is wrong with a configuration: each mistake with its place, its sentence and a hint.

Checks speak to the operator by raising `mistake(...)`; config.py finds out where in which file that is.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic_core import PydanticCustomError

# What other firewalls call it.
SYNONYMS: Final = {
    "allow": "accept",
    "pass": "accept",
    "deny": "drop",
    "block": "drop",
    "saddr": "source",
    "daddr": "destination",
    "dst": "destination",
}


@dataclass(frozen=True)
class ConfigError:
    """One mistake. Lines and columns count from 1; line 0 = the file as a whole could not be read."""

    file: str
    line: int
    column: int
    end_column: int
    message: str
    hint: str
    source: str  # the line of the file

    def __str__(self) -> str:
        """Write it as compilers do: the place, the sentence, the line and what of it is meant."""
        return self.write("error")

    def write(self, kind: str) -> str:
        """Write it as an error, or as what else `kind` says."""
        sentence = f"{self.message}; {self.hint}" if self.hint else self.message
        if not self.line:
            return f"{self.file}: {kind}: {sentence}"
        # Tabs stay tabs, so that the carets stand under what they mean.
        before = re.sub(r"[^\t]", " ", self.source[: self.column - 1])
        carets = "^" * max(1, self.end_column - self.column)
        # What a terminal would obey, or not show, is shown as a character that is none.
        source = "".join(char if char.isprintable() or char == "\t" else "\ufffd" for char in self.source)
        return (
            f"{self.file}:{self.line}:{self.column}: {kind}: {sentence}\n"
            f"{self.line:5} | {source}\n"
            f"{'':5} | {before}{carets}"
        )


class ConfigErrors(Exception):  # noqa: N818 - it carries the errors
    """Everything for which a configuration cannot be used."""

    def __init__(self, errors: list[ConfigError]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        """Write all mistakes and how many there are."""
        lines = [str(error) for error in self.errors]
        if any(error.line for error in self.errors):
            count = len(self.errors)
            lines.append(f"{count} error{'' if count == 1 else 's'}; nothing was changed")
        return "\n".join(lines)


def mistake(message: str, hint: str = "", key: str = "") -> PydanticCustomError:
    """Make the exception by which a check speaks to the operator; `key`: it is about this key of the table."""
    return PydanticCustomError("mistake", "{message}", {"message": message, "hint": hint, "key": key})


def nearest(word: object, options: Sequence[str]) -> str:
    """Say which of the options the operator may have meant: a hint, or "" when none is near."""
    meant = SYNONYMS.get(str(word).lower(), "")
    if meant in options:
        return f"did you mean {meant!r}?"
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return f"did you mean {by_lower[found[0]]!r}?" if found else ""


def sentence(message: str, hint: str) -> str:
    """Put what is wrong, and a hint or "", into one sentence."""
    text = f"{message}; {hint}" if hint else message
    return text if text.endswith("?") else f"{text}."


def any_of(options: Sequence[str]) -> str:
    """Join words for a sentence: `a, b or c`."""
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def shown(value: object) -> str:
    """Write a value of the file for a sentence."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge number"  # Python refuses to write the longest of them
    return repr(value).lower() if isinstance(value, bool) else repr(value)
