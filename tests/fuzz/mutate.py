"""Mutation without coverage, for where atheris is not: it finds what is near valid packets."""

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from tests.fuzz.targets import TARGETS

HANG_SECONDS: Final = 20  # for one input; what is bounded takes milliseconds
INTERESTING: Final = (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff")


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change a seed in a few places: bits, bytes, lengths, pieces of others."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            piece = rng.choice(INTERESTING)
            data[at : at + len(piece)] = piece
        elif kind == 3:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            data[at:at] = other[start : start + rng.randint(1, 80)]
    return bytes(data)


def run(target: str, seeds: Sequence[bytes], seconds: float, artifacts: Path, seed: int) -> int:
    """Feed a target mutated seeds; returns how many. Writes the input that fails down and lets its exception out."""

    def hangs(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"one input took more than {HANG_SECONDS} seconds")

    one_input = TARGETS[target]
    rng = random.Random(seed)
    previous = signal.signal(signal.SIGALRM, hangs)
    count = 0
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            data = mutate(rng, seeds)
            signal.alarm(HANG_SECONDS)
            try:
                one_input(data)
            except Exception:
                (artifacts / f"crash-{target}").write_bytes(data)
                raise
            count += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return count
