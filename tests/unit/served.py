"""A control socket that is served from a thread, by the real server."""

import selectors
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conntrackd.daemon.control import Answer, Control


@contextmanager
def served(path: Path, answer: Answer) -> Iterator[None]:
    """Serve `path` until the block ends."""
    selector = selectors.DefaultSelector()
    control = Control(str(path), selector, answer)
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            for key, events in selector.select(0.01):
                key.data(events)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        control.close()
        selector.close()
