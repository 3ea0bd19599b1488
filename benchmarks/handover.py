"""A restart in place with a big table: how long does a packet wait for it, and is one lost?

    make bench-handover

A real daemon, compiled, in the router of a private network, with that many flows. Over the restart 5,000 datagrams a
second go through, and pings to and fro; the longest ping is what a user notices.
"""

import argparse
import time
from typing import Final

from benchmarks.contestants import conntrackd_env
from benchmarks.flows import RATE, Traffic, open_flows, open_now
from benchmarks.processors import DAEMON_CPU, pin
from benchmarks.programs import ROOT
from tests.lab.daemon import POLICY, daemon
from tests.lab.network import network, wait_until

CONFIG: Final = POLICY + '[conntrack]\nmax = 4000000\nudp_timeout = "1h"\nadaptive_end = 0\n[state]\ndirectory = ""\n'
NETWORK: Final = "198.51.100.0/24"
FLOWS: Final = (1000, 100_000, 1_000_000)
QUIET_S: Final = 1.0
TRAFFIC_S: Final = {100_000: 8, 1_000_000: 30}  # longer than a restart takes


def measure(flows: int) -> None:
    """Restart a daemon that has so many flows, and print what became of the packets."""
    with network() as net:
        net.router.run("ip", "route", "add", NETWORK, "via", net.server.ipv4)
        env = conntrackd_env(compiled=True)
        env["PYTHONPATH"] += f":{ROOT}"
        with daemon(net.router, CONFIG, env=env) as here:
            assert here.process is not None
            pin(here.process.pid, DAEMON_CPU)
            open_flows(net, here, flows)
            traffic = Traffic(net, next((seconds for most, seconds in TRAFFIC_S.items() if flows <= most), 60))
            time.sleep(QUIET_S)
            begin = time.monotonic()
            here.restart()
            wait_until(lambda: "queue_adopted" in here.log(), "the next program has taken over", 120)
            took_s = time.monotonic() - begin
            found = traffic.figures()
            udp = found["udp"]
            print(
                f"{flows:>9,} flows: a ping took at most {found['ping']['max_us'] / 1000:,.0f} ms, "
                f"{udp['sent'] - udp['received']} of {udp['sent']:,} datagrams at {RATE:,}/s lost, "
                f"{open_now(here):,} flows after it, {took_s:.1f} s in all",
                flush=True,
            )


def main() -> None:
    """Measure with each number of flows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover")
    parser.add_argument("--flows", type=int, nargs="*", default=FLOWS)
    for flows in parser.parse_args().flows:
        measure(flows)


if __name__ == "__main__":
    main()
