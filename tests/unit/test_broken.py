"""A hundred broken configurations (broken/NAME.toml): each gets the sentence that NAME.txt says, at that place."""

import json
from pathlib import Path

import pytest

from tests.unit.test_config import run_check

BROKEN = Path(__file__).parent / "broken"
FILES = sorted(BROKEN.glob("*.toml"))


def test_there_are_a_hundred() -> None:
    assert len(FILES) >= 100
    assert {file.stem for file in FILES} == {file.stem for file in BROKEN.glob("*.txt")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_gets_its_sentence(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = file.with_suffix(".txt").read_text().splitlines()
    assert run_check(str(file)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    places = [line.replace(f"{BROKEN}/", "") for line in err.splitlines() if line.startswith(str(file))]
    assert places == [f"{file.name}:{line.replace(': ', ': error: ', 1)}" for line in expected]
    assert err.splitlines()[-1].endswith("; nothing was changed")

    assert run_check(str(file), "-o", "json") == 2
    found = json.loads(capsys.readouterr().out)
    assert [f"{error['line']}:{error['column']}" for error in found] == [line.split(": ")[0] for line in expected]
