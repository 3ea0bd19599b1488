"""Puts the kernel's rules in place at the start, in a thread: the packets that come meanwhile get their verdicts."""

import contextlib
import socket
import threading

from conntrackd.config import Config
from conntrackd.daemon import rules
from conntrackd.daemon.rulescheck import Saved


class RulesJob:
    """`rules.install`, if `[rules] at_start` wants it. A byte into `wakeup` tells the loop that it is `done`.

    `error` is the sentence for the operator when it failed, and empty when not. `chains` and `installed` are what was
    asked for, and how iptables-save prints it, by iptables command; both are empty if nothing was wanted.
    """

    def __init__(self, config: Config, wakeup: socket.socket) -> None:
        self.done = False
        self.error = "The rules could not be installed because of a fault of conntrackd: see its log."
        self.chains: dict[str, list[rules.Chain]] = {}
        self.installed: dict[str, Saved] = {}
        self._config = config
        self._wakeup = wakeup
        self._thread = threading.Thread(target=self._work, name="rules", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            if self._config.rules.at_start == "install":
                self.chains = rules.plans(self._config)
                self.installed = rules.install(self.chains)
            self.error = ""
        except rules.RulesError as error:
            self.error = str(error)
        finally:
            self.done = True
            with contextlib.suppress(BlockingIOError):  # it is full: the loop is about to look anyway
                self._wakeup.send(b"\0")

    def wait(self) -> None:
        """Wait until it is done, or has failed."""
        self._thread.join()
