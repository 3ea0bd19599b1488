"""The C programs of the benchmarks, compiled when they are needed."""

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILT = ROOT / "build" / "bench"
LIBRARIES = {"blast": ["-lpthread"], "noop": ["-lnetfilter_queue"]}


def program(name: str) -> Path:
    """The path of a program, compiled if it is not yet or if its source is newer. CalledProcessError if that fails."""
    source = HERE / f"{name}.c"
    made = BUILT / name
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        BUILT.mkdir(parents=True, exist_ok=True)
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["cc", *flags, str(source), "-o", str(made), *LIBRARIES[name]], check=True)
    return made
