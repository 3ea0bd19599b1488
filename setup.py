"""Compile the packet path with mypyc where a compiler is there; without one, or if CONNTRACKD_PURE=1, leave it Python.

The compiled modules are the same source: a package that is installed compiled carries both.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

NOT_COMPILED = ("__init__.py", "compile.py", "explain.py")  # nothing in them is on the packet path
COMPILED = (
    "const.py",
    "wire/*.py",
    "core/*.py",
    "core/proto/*.py",
    "core/helpers/*.py",
    "policy/*.py",
    "hooks.py",
    "daemon/mark.py",
    "daemon/nfnetlink.py",
    "daemon/queue.py",
    "daemon/restore.py",
)


def packet_path() -> list[str]:
    """List the modules that mypyc compiles, all in one group: calls between them are plain C calls."""
    package = Path(__file__).parent / "conntrackd"
    files = [file for pattern in COMPILED for file in sorted(package.glob(pattern)) if file.name not in NOT_COMPILED]
    return [str(file.relative_to(package.parent)) for file in files]


def can_compile() -> bool:
    """Whether a C compiler and mypyc are there, and compiling is wanted (an editable install never is compiled)."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    wanted = os.environ.get("CONNTRACKD_PURE") != "1" and "editable_wheel" not in sys.argv
    return wanted and shutil.which(compiler) is not None


extensions = []
if can_compile():
    from mypyc.build import mypycify

    # Style and types are checked elsewhere (`make check`); here libraries without stubs need not be installed.
    options = ["--config-file=", "--ignore-missing-imports"]
    extensions = mypycify([*options, *packet_path()], opt_level="3", group_name="conntrackd")

setup(ext_modules=extensions)
