"""Messages to systemd over NOTIFY_SOCKET: ready, alive, reloading, stopping.  Nothing happens outside of systemd."""

from __future__ import annotations

import logging
import os
import socket
import time
import weakref
from collections.abc import Mapping

__all__ = ["Notifier"]

log = logging.getLogger(__name__)


class Notifier:
    """Sends state to the service manager.  Source: sd_notify(3).

    interval_ns  how often ``WATCHDOG=1`` is due, half of what the manager tolerates; 0 when it does not watch.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        address = environment.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of Linux's abstract names.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # Made now: later there may be no file left to make one with, and silence would end the service.
        self._channel = (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if self._address else None
        )
        if self._channel is not None:
            self._channel.settimeout(1.0)
            weakref.finalize(self, self._channel.close)
        microseconds = environment.get("WATCHDOG_USEC", "")
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.interval_ns = int(microseconds) * 500 if mine and microseconds.isdigit() and self._address else 0

    def ready(self) -> None:
        """Start-up, or a reload, is complete."""
        self.send("READY=1")

    def reloading(self) -> None:
        """A reload has begun."""
        self.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def alive(self) -> None:
        """The watchdog may sleep on."""
        self.send("WATCHDOG=1")

    def stopping(self) -> None:
        """The stop has begun."""
        self.send("STOPPING=1")

    def send(self, message: str) -> None:
        """Send one datagram; a failure is logged: frames matter more."""
        if self._channel is None:
            return
        try:
            self._channel.sendto(message.encode(), self._address)
        except OSError as error:
            log.warning("systemd was not told %s: %s", message.partition("\n")[0], error)
