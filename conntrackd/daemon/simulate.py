"""Failures on purpose, for tests: `conntrackd run --simulate exception:N`."""

import os
from collections.abc import Callable
from typing import Final

from conntrackd.hooks import Firewall, pre_routing

SWITCH: Final = "CONNTRACKD_TEST"

Track = Callable[[Firewall, bytes, int, int, int, int], int]


class SimulateError(Exception):
    """The simulation is refused; the text is one sentence."""


def tracking(simulate: str | None) -> Track:
    """Give hooks.pre_routing; for `exception:N` one that raises at the Nth packet. Raises SimulateError."""
    if simulate is None:
        return pre_routing
    if os.environ.get(SWITCH) != "1":
        raise SimulateError(f"--simulate is for tests only: it needs {SWITCH}=1 in the environment.")
    kind, _, number = simulate.partition(":")
    if kind != "exception" or not number.isdecimal():
        raise SimulateError(f"--simulate {simulate} is not known: it takes exception:N.")
    left = int(number)

    def failing(fw: Firewall, data: bytes, hook: int, iif: int, now_ms: int, mark: int) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError(f"simulated failure at packet {number}")
        return pre_routing(fw, data, hook, iif, now_ms, mark)

    return failing
