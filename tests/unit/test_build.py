"""Which of the two builds is under test."""

import os
import subprocess
import sys

import pytest

from conntrackd.core import compiled


@pytest.mark.skipif("CONNTRACKD_EXPECT" not in os.environ, reason="any build will do")
def test_the_expected_build_is_tested() -> None:
    assert compiled() is (os.environ["CONNTRACKD_EXPECT"] == "compiled")


def test_pure_is_pure_even_where_it_is_compiled() -> None:
    program = "from conntrackd import hooks; from conntrackd.core import compiled; print(compiled(), hooks.__file__)"
    environment = {**os.environ, "CONNTRACKD_PURE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    said, file = done.stdout.split()
    assert said == "False"
    assert file.endswith(".py")
