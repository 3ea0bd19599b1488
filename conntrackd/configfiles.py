"""The files of a configuration: the main one and conf.d/*.toml beside it, merged, and where in them a key stands."""

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from conntrackd.mistakes import ConfigError, ConfigErrors, any_of, nearest, shown
from conntrackd.tomlplaces import Span, TomlPlaces

# What the files of conf.d may add to, and what that must be.
PARTS: Final = {"labels": dict, "rule": list, "services": dict, "sets": dict, "zones": dict}


class SourceFile(NamedTuple):
    """One file: what it is called in errors, and its text."""

    name: str
    text: bytes


def read(path: str | Path) -> list[SourceFile]:
    """Read a configuration file and conf.d/*.toml beside it, in the order of their names; raises ConfigErrors."""
    main = Path(path)
    folder = main.parent / "conf.d"
    names, files, errors = [main], [], []
    try:
        # Not glob(), to which a folder that may not be read is empty: the policy would lack its rules, and nobody knew.
        names += sorted(folder / name for name in os.listdir(folder) if name.endswith(".toml"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        errors.append(_unreadable(folder, error))
    for name in names:
        try:
            files.append(SourceFile(str(name), name.read_bytes()))
        except OSError as error:
            errors.append(_unreadable(name, error))
    if errors:
        raise ConfigErrors(errors)
    return files


def _unreadable(path: Path, error: OSError) -> ConfigError:
    sentence = f"the configuration cannot be read: {error.strerror}"
    return ConfigError(str(path), 0, 0, 0, sentence, "", "")


class Files:
    """Files that were parsed; `data` is all of them as one. The mistakes of merging are in `errors`."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self.files = list(files)
        self.errors: list[ConfigError] = []
        self._places: dict[int, TomlPlaces] = {}
        self._rules: list[tuple[int, int]] = []  # file and place in it, of each rule
        self._names: dict[tuple[str, str], int] = {}  # file of each zone, set, service and label
        parsed = []
        for file in self.files:
            try:
                parsed.append(_parse(file))
            except ConfigErrors as unreadable:
                self.errors += unreadable.errors
        if self.errors:
            raise ConfigErrors(self.errors)
        self.data = parsed[0]
        rules = self.data.get("rule")
        if isinstance(rules, list):
            self._rules = [(0, index) for index in range(len(rules))]
        for number, part in enumerate(parsed[1:], start=1):
            self._merge(number, part)

    def _merge(self, number: int, part: dict[str, Any]) -> None:
        for key in part:
            value: Any = part[key]
            if key not in PARTS:
                expected = any_of(list(PARTS))
                message = f"{key!r} does not belong in a file of conf.d (expected {expected})"
                self._complain(number, (key,), True, message, nearest(key, list(PARTS)))
                continue
            kind: type = PARTS[key]
            fits = isinstance(value, kind)
            if not fits:
                wanted = "a list of tables, each headed by [[rule]]" if key == "rule" else "a table"
                self._complain(number, (key,), False, f"{key!r} cannot be {shown(value)} (expected {wanted})", "")
                continue
            whole: Any = self.data.setdefault(key, kind())
            fits = isinstance(whole, kind)
            if not fits:
                continue  # the main file is wrong, which is found later
            if isinstance(value, list):
                self._rules += [(number, index) for index in range(len(value))]
                whole += value
                continue
            for name, entry in value.items():
                if name in whole:
                    before = self.files[self._names.get((key, name), 0)].name
                    self._complain(number, (key, name), True, f"{key}.{name} is already defined in {before}", "")
                else:
                    whole[name] = entry
                    self._names[key, name] = number

    def _complain(self, number: int, path: Sequence[str | int], key: bool, message: str, hint: str) -> None:
        places = self._places_of(number)
        span = places.key(path) if key else places.value(path)
        self.errors.append(error_at(self.files[number], span, message, hint))

    def _places_of(self, number: int) -> TomlPlaces:
        if number not in self._places:
            self._places[number] = TomlPlaces(self.files[number].text)
        return self._places[number]

    def error(self, path: Sequence[str | int], key: bool, message: str, hint: str) -> ConfigError:
        """Make the mistake about what stands at a path of `data`: about its key, or about its value."""
        number, local = 0, tuple(path)
        if len(local) > 1 and local[0] == "rule" and isinstance(local[1], int):
            number, index = self._rules[local[1]]
            local = ("rule", index, *local[2:])
        elif len(local) > 1:
            number = self._names.get((str(local[0]), str(local[1])), 0)
        places = self._places_of(number)
        span = places.key(local) if key else places.value(local)
        return error_at(self.files[number], span, message, hint)

    def order(self, error: ConfigError) -> tuple[int, int, int]:
        """Give the place of an error in the order of the files."""
        names = [file.name for file in self.files]
        return (names.index(error.file) if error.file in names else len(names), error.line, error.column)


def error_at(file: SourceFile, span: Span, message: str, hint: str) -> ConfigError:
    """Make a mistake with the line that it is in."""
    line = file.text.split(b"\n")[span.line - 1].rstrip(b"\r").decode(errors="replace")
    return ConfigError(file.name, span.line, span.column, span.end_column, message, hint, line)


def _parse(file: SourceFile) -> dict[str, Any]:
    """Read TOML; raises ConfigErrors."""
    source = file.text
    try:
        return tomllib.loads(source.decode())
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        column = len(source[source.rfind(b"\n", 0, error.start) + 1 : error.start].decode()) + 1
        mistake = error_at(file, Span(line, column, column + 1), "the text is not UTF-8", "")
    except RecursionError:
        mistake = error_at(file, Span(1, 1, 2), "lists or tables are nested too deeply", "")
    except tomllib.TOMLDecodeError as error:
        mistake = _syntax_error(file, str(error))
    except ValueError:  # from int(), which refuses numbers of thousands of digits
        mistake = error_at(file, Span(1, 1, 2), "a number has too many digits", "")
    raise ConfigErrors([mistake])


def _syntax_error(file: SourceFile, text: str) -> ConfigError:
    """Take the place out of tomllib's sentence, the only form in which it gives it."""
    found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", text, re.DOTALL)
    if found:
        message, line, column = found[1], int(found[2]), int(found[3])
    else:
        message = text.removesuffix(" (at end of document)")
        lines = file.text.decode().rstrip().split("\n")
        line, column = len(lines), len(lines[-1].rstrip("\r")) + 1
    hint = "text must stand in quotes" if message == "Invalid value" else ""
    if message == r"Illegal character '\n'":
        message, hint = "the text in quotes does not end on its line", "add the quote at its end"
    message = re.sub(r"\('(.*)',?\)", lambda path: f"[{path[1].replace(chr(39) + ', ' + chr(39), '.')}]", message)
    return error_at(file, Span(line, column, column + 1), message[:1].lower() + message[1:], hint)
