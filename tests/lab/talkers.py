"""Both ends of a load, each a process in its namespace: `python -m tests.lab.talkers server|client ...`.

The client keeps connections on which the server speaks first, opens new ones at a steady rate, each of which exchanges
something, rests and exchanges again, and sends numbered datagrams, each of which is answered. SIGTERM ends it; it then
prints what became of all that as JSON.
"""

import argparse
import asyncio
import json
import signal
import time
from collections import Counter
from typing import Any, Final

PORT: Final = 7000
PATIENCE_S: Final = 60.0  # TCP sends again by itself; this long is broken
GRACE_S: Final = 1.5  # without an answer, in the end: those that are missing do not come any more
PULSE_S: Final = 0.25
REST_S: Final = 1.0
LINE: Final = b"hello from the other side\n"


class Echo(asyncio.DatagramProtocol):
    """Sends every datagram back."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


async def serve(address: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line == b"speak\n":
                for number in range(1 << 30):
                    writer.write(b"%d\n" % number)
                    await writer.drain()
                    await asyncio.sleep(PULSE_S)
            else:
                while line:
                    writer.write(line)
                    await writer.drain()
                    line = await reader.readline()
        except OSError:
            pass  # the client says what it was
        finally:
            writer.close()

    await asyncio.get_running_loop().create_datagram_endpoint(Echo, local_addr=(address, PORT))
    server = await asyncio.start_server(talk, address, PORT, backlog=1000)
    print("ready", flush=True)
    await server.serve_forever()


class Client:
    """The client's side, and its counts."""

    def __init__(self, address: str, held: int, per_second: int, probes_per_second: int) -> None:
        self.address = address
        self.wanted_held = held
        self.per_second = per_second
        self.probes_per_second = probes_per_second
        self.stop = asyncio.Event()
        self.held = self.opened = self.unopened = self.finished = 0
        self.broken: Counter[str] = Counter()
        self.sent = 0
        self.answered: set[int] = set()
        self.heard_s = time.monotonic()
        self.slowest_s = 0.0

    def failed(self, what: str, error: BaseException) -> None:
        self.broken[f"{what}: {type(error).__name__}"] += 1

    async def hold(self) -> None:
        """Listen to the server for as long as the load lasts; every line must come, in order."""
        try:
            reader, writer = await asyncio.open_connection(self.address, PORT)
            writer.write(b"speak\n")
            number = 0
            while not self.stop.is_set():
                line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
                if line != b"%d\n" % number:
                    raise ConnectionError(line)
                number += 1
                if number == 1:
                    self.held += 1
            writer.close()
        except (OSError, TimeoutError) as error:
            self.failed("held", error)

    async def visit(self) -> None:
        """One new connection."""
        begun = time.monotonic()
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(self.address, PORT), PATIENCE_S)
        except (OSError, TimeoutError):
            self.unopened += 1
            return
        try:
            for rest_s in (REST_S, 0.0):
                writer.write(LINE)
                if await asyncio.wait_for(reader.readline(), PATIENCE_S) != LINE:
                    raise ConnectionError
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
                await asyncio.sleep(rest_s)
                begun = time.monotonic()
            writer.close()
            await writer.wait_closed()
            self.finished += 1
        except (OSError, TimeoutError) as error:
            self.failed("new", error)

    async def visits(self) -> None:
        tasks = set()
        while not self.stop.is_set():
            task = asyncio.create_task(self.visit())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            self.opened += 1
            await asyncio.sleep(1 / self.per_second)
        await asyncio.gather(*tasks)

    async def probes(self) -> None:
        client = self

        class Answers(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:  # noqa: ARG002
                client.answered.add(int.from_bytes(data, "big"))
                client.heard_s = time.monotonic()

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Answers, remote_addr=(self.address, PORT)
        )
        while not self.stop.is_set():
            transport.sendto(self.sent.to_bytes(8, "big"))
            self.sent += 1
            await asyncio.sleep(1 / self.probes_per_second)
        while len(self.answered) < self.sent and time.monotonic() - self.heard_s < GRACE_S:
            await asyncio.sleep(0.05)
        transport.close()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        holding = [asyncio.create_task(self.hold()) for _ in range(self.wanted_held)]
        others = [asyncio.create_task(self.visits()), asyncio.create_task(self.probes())]
        while self.held < self.wanted_held and not self.broken:
            await asyncio.sleep(0.05)
        print("ready", flush=True)
        await asyncio.gather(*holding, *others)
        result = {
            "held": self.held,
            "opened": self.opened,
            "unopened": self.unopened,
            "finished": self.finished,
            "broken": dict(self.broken),
            "sent": self.sent,
            "lost": self.sent - len(self.answered),
            "slowest_s": round(self.slowest_s, 2),
        }
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("end", choices=["server", "client"])
    parser.add_argument("address", help="of the server")
    parser.add_argument("--held", type=int, default=50)
    parser.add_argument("--new", type=int, default=50, help="connections per second")
    parser.add_argument("--probes", type=int, default=200, help="datagrams per second")
    options = parser.parse_args()
    if options.end == "server":
        asyncio.run(serve(options.address))
    else:
        asyncio.run(Client(options.address, options.held, options.new, options.probes).run())


if __name__ == "__main__":
    main()
