"""Choose the ports of a local system, and name one that is taken."""

from __future__ import annotations

import errno
import socket

from stoker_core.clock import Clock
from stoker_core.errors import PortTaken

HOST = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


async def choose(port: int, *, what: str, setting: str, clock: Clock, patience_s: float = 0.0) -> int:
    """`port`, or any free one for 0.

    patience_s: how long to wait for servers of an earlier run to let go of it.
    Raises PortTaken naming the setting.
    """
    if port == 0:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            return int(probe.getsockname()[1])
    until_s = clock.monotonic_s() + patience_s
    while not is_free(port):
        if clock.monotonic_s() >= until_s:
            raise PortTaken(port, what, setting)
        await clock.sleep(0.1)
    return port
