"""What a first program on NetfilterQueue does: accept every packet, after parsing it with scapy if so asked.

    noop.py noop|scapy LENGTH SOCKET_BUFFER QUEUE [QUEUE]

With two queues the second one (POSTROUTING) goes first and the first one yields after 64 packets, as conntrackd does
it; without that the first one starves the second one under load. Prints "ready".
"""

import contextlib
import itertools
import select
import sys
from collections.abc import Callable

from netfilterqueue import NetfilterQueue, Packet

# Longer messages than the 4096 bytes that NetfilterQueue reads are lost together with their place in the queue.
COPY_RANGE = 3900
YIELD_AFTER = 64


class Yield(Exception):  # noqa: N818 - not an error
    """Leaves NetfilterQueue.run() in between."""


def scapy_callback() -> Callable[[Packet], None]:
    from scapy.layers.inet import IP

    def on_packet(packet: Packet) -> None:
        IP(packet.get_payload())
        packet.accept()

    return on_packet


def noop_callback(packet: Packet) -> None:
    packet.accept()


def yielding(callback: Callable[[Packet], None]) -> Callable[[Packet], None]:
    """The same callback, but run() is left after every few packets."""
    count = itertools.count(1)

    def on_packet(packet: Packet) -> None:
        callback(packet)
        if not next(count) % YIELD_AFTER:
            raise Yield

    return on_packet


def main() -> None:
    kind, length, socket_buffer, *numbers = sys.argv[1:]
    callback = scapy_callback() if kind == "scapy" else noop_callback

    def bind(number: str, on_packet: Callable[[Packet], None]) -> NetfilterQueue:
        queue = NetfilterQueue()
        queue.bind(int(number), on_packet, max_len=int(length), range=COPY_RANGE, sock_len=int(socket_buffer))
        return queue

    if len(numbers) == 1:
        only = bind(numbers[0], callback)
        print("ready", flush=True)
        only.run()
        return
    second = bind(numbers[1], callback)
    first = bind(numbers[0], yielding(callback))
    print("ready", flush=True)
    poll = select.poll()
    for queue in first, second:
        poll.register(queue.get_fd(), select.POLLIN)
    second_fd = second.get_fd()
    while True:
        waiting = [fd for fd, _ in poll.poll()]
        if second_fd in waiting:
            second.run(block=False)
        if len(waiting) > 1 or second_fd not in waiting:
            with contextlib.suppress(Yield):
                first.run(block=False)


if __name__ == "__main__":
    main()
