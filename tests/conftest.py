"""What all tests share: SIGTERM takes the networks down, and tests that need root say so."""

import os
import signal
from types import FrameType

import pytest


def pytest_configure() -> None:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("netns"):
            item.add_marker(pytest.mark.skip(reason="builds network namespaces: needs root"))
