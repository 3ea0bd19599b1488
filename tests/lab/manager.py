"""A service manager, played by the test: what systemd would hear of a daemon (sd_notify(3))."""

import socket
from pathlib import Path

from tests.lab.network import wait_until


class Manager:
    """The socket that NOTIFY_SOCKET names, and the messages that came to it."""

    def __init__(self, directory: Path) -> None:
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(directory / "notify.sock"))
        self.environ = {"NOTIFY_SOCKET": str(directory / "notify.sock"), "WATCHDOG_USEC": "1000000"}

    def listen(self) -> list[dict[str, str]]:
        """Take in what has been said so far; all of it since `forget`."""
        while True:
            try:
                said = self._socket.recv(4096).decode()
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in said.split("\n")))

    def forget(self) -> None:
        """Begin anew."""
        self.listen()
        self.heard.clear()

    def wait_for(self, word: str) -> dict[str, str]:
        """Wait for a message with `word=1`; the message."""
        return wait_until(lambda: [said for said in self.listen() if said.get(word) == "1"], f"{word}=1")[0]

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
