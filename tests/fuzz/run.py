"""No input raises in the header readers, conntrack_in, the hooks or what reads a snapshot, nor breaks what
tests/fuzz/invariants.py says.

    python -m tests.fuzz.run --seconds 60              all targets, as many at once as there are processors
    python -m tests.fuzz.run --target hooks --corpus D keep what reaches new code in D/hooks, and begin there next time
    python -m tests.fuzz.run --replay FILE             an input that failed, once more

Guided by coverage where atheris is installed, else by chance.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

NOT_INSTRUMENTED: Final = ["conntrackd.config", "conntrackd.tomlplaces"]  # no packet comes there
HELPERS: Final = tuple(
    f"helper-{name}" for name in ("amanda", "broadcast", "ftp", "irc", "pptp", "sane", "sip-tcp", "sip-udp", "tftp")
)
TARGET_NAMES: Final = ("readers", "conntrack", "hooks", "snapshot", *HELPERS)
SHARES: Final = {"readers": 3, "conntrack": 6, "hooks": 6, "snapshot": 3, **dict.fromkeys(HELPERS, 1)}  # of the time
INPUT_MAX: Final = 4096  # bytes


def atheris_installed() -> bool:
    return importlib.util.find_spec("atheris") is not None


def seeds(target: str) -> list[bytes]:
    """What fuzzing begins with: valid packets, in conversations where the target takes those."""
    from tests.fuzz.seeds import conversations
    from tests.fuzz.targets import FROM_SERVER, OWN, SKIPS_FIRST_HOOK, pack

    if target in HELPERS:
        from tests.fuzz.helpers import seeds as helper_seeds

        return helper_seeds(target)
    if target == "snapshot":
        from tests.fuzz.snapshots import seeds as snapshot_seeds

        return snapshot_seeds()
    if target == "readers":
        return [packet for conversation in conversations() for _, packet in conversation]
    found = []
    for conversation in conversations():
        for settings, circumstances in ((0, 0), (1, 0), (0, OWN), (0, SKIPS_FIRST_HOOK)):
            steps = [(circumstances | (FROM_SERVER if back else 0), packet) for back, packet in conversation]
            found.append(pack(steps, settings))
    return found


def guided(target: str, seconds: int, corpus: Path, artifacts: Path) -> None:
    """Hand this process over to libFuzzer; it ends it, with a status other than 0 if an input failed."""
    import atheris

    import conntrackd  # noqa: F401 - first: it says that Python source is to be found, not compiled modules

    with atheris.instrument_imports(include=["conntrackd"], exclude=NOT_INSTRUMENTED):
        from tests.fuzz.targets import TARGETS

    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_MAX}",
        "-timeout=20",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
        "-verbosity=0",
        f"-artifact_prefix={artifacts}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


def fuzz(target: str, seconds: int, corpus: Path, artifacts: Path, seed: int) -> bool:
    """Fuzz one target in this process or a process of its own; returns whether it held."""
    corpus.mkdir(parents=True, exist_ok=True)
    if not atheris_installed():
        from tests.fuzz import mutate

        count = mutate.run(target, seeds(target), seconds, artifacts, seed)
        print(f"{target}: {count} inputs by chance, seed {seed}")
        return True
    command = [sys.executable, "-m", "tests.fuzz.run", "--guided", "--target", target, "--seconds", str(seconds)]
    command += ["--corpus", str(corpus), "--artifacts", str(artifacts)]
    # Compiled modules cannot be instrumented; the same source runs pure.
    result = subprocess.run(
        command,
        env={**os.environ, "CONNTRACKD_PURE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    guided_by = result.stdout.count("INFO: Instrumenting conntrackd.core")
    executed = [line.split()[-1] for line in result.stdout.splitlines() if "number_of_executed_units" in line]
    if result.returncode or not executed or not guided_by:
        print(result.stdout)
        return False
    print(f"{target}: {executed[0]} inputs guided by coverage, {len(list(corpus.iterdir()))} in the corpus")
    return True


def replay(target: str, path: Path) -> None:
    """Run one input as it stands."""
    from tests.fuzz.targets import TARGETS

    for name in [target] if target else TARGET_NAMES:
        TARGETS[name](path.read_bytes())
        print(f"{name}: holds")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together (default: 60)")
    parser.add_argument("--target", choices=TARGET_NAMES, help="only this one")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found")
    parser.add_argument("--artifacts", type=Path, help="folder for inputs that fail (default: one in /tmp)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input")
    parser.add_argument("--seed", type=int, default=1, help="of the chance, without atheris (default: 1)")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay:
        replay(options.target, options.replay)
        return 0
    if options.guided:
        guided(options.target, options.seconds, options.corpus, options.artifacts)
        return 0
    if not atheris_installed():
        print(f"atheris is not installed for Python {sys.version_info[0]}.{sys.version_info[1]}: no coverage guides")
    targets = [options.target] if options.target else list(TARGET_NAMES)
    shares = sum(SHARES[target] for target in targets)
    artifacts = options.artifacts or Path(tempfile.mkdtemp(prefix="conntrackd-fuzz-"))
    artifacts.mkdir(parents=True, exist_ok=True)
    at_once = (os.cpu_count() or 1) if atheris_installed() else 1
    with tempfile.TemporaryDirectory(prefix="conntrackd-corpus-") as scratch:

        def work(target: str) -> bool:
            seconds = max(1, options.seconds * at_once * SHARES[target] // shares)
            return fuzz(target, seconds, (options.corpus or Path(scratch)) / target, artifacts, options.seed)

        with ThreadPoolExecutor(at_once) as pool:
            held = all(list(pool.map(work, targets)))
    failed = [str(path) for path in artifacts.iterdir()]
    if failed:
        print("Run an input that failed once more with: python -m tests.fuzz.run --replay", *failed)
    elif not options.artifacts:
        artifacts.rmdir()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
