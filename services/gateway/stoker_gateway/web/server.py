"""The HTTP server as a part of the service."""

from __future__ import annotations

import asyncio
import errno

from aiohttp import web

from stoker_core.errors import PortTaken
from stoker_core.logging import get_logger

log = get_logger("http")

CLOSE_TIMEOUT_S = 1.0  # for handlers that the drain left over, before they are cancelled


class HttpServer:
    def __init__(self, app: web.Application, host: str, port: int) -> None:
        """port: 0 takes any free one."""
        # A client that goes away cancels its handler, and with it the request at the instance.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=CLOSE_TIMEOUT_S)
        self._host = host
        self._port = port

    @property
    def port(self) -> int:
        """Where it listens, once `start` returned."""
        return int(self._runner.addresses[0][1])

    async def start(self) -> None:
        """Raises PortTaken."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortTaken(self._port, "the gateway", "STOKER_GATEWAY_PORT") from error
        log.info("http_listening", host=self._host, port=self.port)

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            await asyncio.Event().wait()
        finally:
            await self._runner.cleanup()
