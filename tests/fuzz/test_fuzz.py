"""A short run of the fuzzer: `make fuzz` runs it for as long as wanted."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import mutate
from tests.fuzz.run import TARGET_NAMES, atheris_installed, seeds
from tests.fuzz.targets import TARGETS, pack, unpack

SECONDS = 6


def test_no_input_breaks_an_invariant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", str(SECONDS), "--artifacts", str(tmp_path)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout
    how = "guided by coverage" if atheris_installed() else "by chance"
    assert result.stdout.count(f"inputs {how}") == len(TARGET_NAMES)
    if not atheris_installed():
        with capsys.disabled():
            print("\natheris is not installed: fuzzed by chance, without coverage")


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_every_seed_holds(target: str) -> None:
    for seed in seeds(target):
        TARGETS[target](seed)


def test_without_atheris_an_input_that_fails_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_zeros(data: bytes) -> None:
        assert bytes(4) not in data

    monkeypatch.setitem(TARGETS, "readers", fails_on_zeros)
    with pytest.raises(AssertionError):
        mutate.run("readers", seeds("hooks"), 60, tmp_path, 1)
    assert bytes(4) in (tmp_path / "crash-readers").read_bytes()


def test_a_conversation_is_read_as_it_was_written() -> None:
    steps = [(0, b"one"), (255, b""), (7, bytes(300))]
    assert list(unpack(pack(steps))) == steps
    assert list(unpack(pack(steps)[:-1])) == [*steps[:2], (7, bytes(299))]
    assert list(unpack(b"")) == []
