"""The policy: what a NEW packet costs with 10 rules and with 10,000, with sets of a million addresses, and loading.

    make bench-policy

In process, no network. Each ruleset is asked about the same packets, in turns with the other, and the ratio of the
medians counts: the machine may be busy.
"""

import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from conntrackd import config
from conntrackd.core import compiled
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.match import judge
from conntrackd.policy.ruleset import NEW, Ruleset

SEED: Final = 7
PACKETS: Final = 2000
ROUNDS: Final = 15
ADDRESSES: Final = 1_000_000
LINKS: Final = {1: "lan0", 2: "wan0", 3: "dmz0"}


def rules(count: int, source: random.Random) -> str:
    """Rules as big rulesets have them: most are about one server and its ports, some about networks, few about all."""
    lines = []
    for number in range(count):
        server = f"10.{source.randrange(256)}.{source.randrange(256)}.{source.randrange(1, 255)}"
        kind = number % 10
        lines += ["[[rule]]", f'name = "r{number}"', f'action = "{source.choice(["accept", "drop"])}"']
        if kind < 6:
            ports = sorted(source.sample(range(1, 10_000), 3))
            lines += ['from = "wan"', f'destination = "{server}"', 'protocol = "tcp"', f"port = {ports}"]
        elif kind < 8:
            low = source.randrange(1024, 60_000)
            network = f"172.16.{source.randrange(256)}.0/24"
            lines += [f'source = "{network}"', 'protocol = ["tcp", "udp"]', f'port = "{low}-{low + 200}"']
        elif kind == 8:
            lines += ['from = "lan"', f'destination = "2001:db8:{source.randrange(65536):x}::/48"']
        else:
            lines += ['from = "dmz"', 'to = "lan"', 'protocol = "udp"', f"port = {source.randrange(10_000, 60_000)}"]
    return "\n".join(lines)


def text(count: int, file: str) -> str:
    """A configuration with so many rules, behind two that look into the big sets."""
    return f"""version = 1
[zones]
lan = {{ interfaces = "lan*" }}
wan = {{ interfaces = "wan*" }}
dmz = {{ interfaces = "dmz*" }}
[sets.bad]
file = "{file}"
[[rule]]
name = "bad-in"
source = "@bad"
action = "drop"
[[rule]]
name = "bad-out"
destination = "@bad"
action = "drop"
{rules(count, random.Random(SEED))}
"""  # noqa: S311


def tuples() -> list[tuple[bytes, int, int]]:
    """Packets to and from everywhere, most of which no rule is about."""
    source = random.Random(SEED + 1)  # noqa: S311
    found = []
    for _ in range(PACKETS):
        inside = bytes((10, source.randrange(256), source.randrange(256), source.randrange(256)))
        outside = bytes(source.randrange(1, 224) for _ in range(4))
        iif, oif, addresses = source.choice(
            [(1, 2, inside + outside), (2, 3, outside + inside), (3, 1, inside + inside)]
        )
        ports = source.randrange(65536).to_bytes(2, "big") + source.randrange(10_000).to_bytes(2, "big")
        found.append((bytes((source.choice([6, 17]),)) + addresses + ports, iif, oif))
    return found


def cost_us(ruleset: Ruleset, packets: list[tuple[bytes, int, int]]) -> float:
    """Judge all packets once; microseconds for each."""
    begun = time.perf_counter()
    for tuple_, iif, oif in packets:
        judge(ruleset, NEW, tuple_, iif, oif, 0)
    return (time.perf_counter() - begun) / len(packets) * 1e6


def memory_mb() -> float:
    """Resident memory at its highest, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(path: Path) -> Ruleset:
    """Load and say what it took."""
    before = memory_mb()
    begun = time.perf_counter()
    checked = config.load(path)
    read = time.perf_counter()
    ruleset = compile_ruleset(checked, 1)
    done = time.perf_counter()
    ruleset.set_links(LINKS)
    columns = sum(len(index.columns) for index in ruleset.indexes)
    print(
        f"{len(checked.rule):6} rules: read and checked in {read - begun:.2f} s, compiled in {done - read:.2f} s, "
        f"+{memory_mb() - before:.0f} MB; {columns} columns in the index"
    )
    return ruleset


def measure() -> int:
    """Measure in this process; returns 1 when the big ruleset costs more than three times the small one."""
    source = random.Random(SEED + 2)  # noqa: S311
    print(f"{'compiled' if compiled() else 'pure'} core, sets of {ADDRESSES} addresses")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "bad.txt")
        numbers = source.sample(range(1 << 24, 224 << 24), ADDRESSES)
        file.write_text("\n".join(f"{n >> 24}.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}" for n in numbers))
        rulesets = {}
        for count in (10, 10_000):
            path = Path(directory, f"{count}.toml")
            path.write_text(text(count, str(file)))
            rulesets[count] = load(path)
    packets = tuples()
    costs: dict[int, list[float]] = {count: [] for count in rulesets}
    for _ in range(ROUNDS):
        for count, ruleset in rulesets.items():
            costs[count].append(cost_us(ruleset, packets))
    medians = {count: statistics.median(values) for count, values in costs.items()}
    for count, median in medians.items():
        print(
            f"{count:6} rules: {median:.2f} us to judge a NEW packet (median of {ROUNDS}, best {min(costs[count]):.2f})"
        )
    ratio = medians[10_000] / medians[10]
    print(f"10,000 rules cost {ratio:.2f} times what 10 do (at most 3 are allowed)")
    return 0 if ratio <= 3 else 1


def main() -> int:
    """Measure pure and compiled, each in a process of its own."""
    from benchmarks.contestants import conntrackd_env
    from benchmarks.programs import ROOT

    codes = []
    for is_compiled in (False, True):
        env = conntrackd_env(is_compiled)
        env["PYTHONPATH"] += f":{ROOT}"
        # Outside of the source tree, which Python would prefer.
        program = "import sys; from benchmarks.policy import measure; sys.exit(measure())"
        done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **env}, cwd="/", check=False)
        codes.append(done.returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
