"""The command line within this process: what it costs to start Python is not the question of every test."""

import contextlib
import io
import subprocess
import sys
from unittest.mock import patch

from conntrackd.cli.main import main


def conntrackd_here(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `conntrackd WORDS`, of a command that prints text."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch.object(sys, "argv", ["", *words]):
        try:
            code = main()
        except SystemExit as end:  # of the parser
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
