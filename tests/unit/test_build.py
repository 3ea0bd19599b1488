"""Which of the two builds is under test."""

import os

import pytest

from conntrackd.core import compiled


@pytest.mark.skipif("CONNTRACKD_EXPECT" not in os.environ, reason="any build will do")
def test_the_expected_build_is_tested() -> None:
    assert compiled() is (os.environ["CONNTRACKD_EXPECT"] == "compiled")
