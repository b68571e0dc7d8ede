"""Subjects that the storage agent answers."""

from __future__ import annotations

from stoker_bus.port import Bus, Message, answer
from stoker_contracts.codec import decode
from stoker_contracts.control import Failed, RegisterModel, RegisterReply
from stoker_core.errors import StokerError
from stoker_core.logging import get_logger
from stoker_core.tracing import span
from stoker_storeagent.register import Registrar

log = get_logger("handlers")


class Handlers:
    def __init__(self, bus: Bus, registrar: Registrar) -> None:
        self._bus, self._registrar = bus, registrar

    async def register(self, message: Message) -> None:
        """`store.<node>.register`: answered Registered or Failed."""
        with span("store.register", headers=message.headers):
            reply: RegisterReply
            try:
                reply = await self._registrar.register(decode(RegisterModel, message.data))
            except StokerError as error:
                log.warning("register_refused", code=error.code, error=error.message)
                # A message may quote file names, which need not be valid text.
                text = error.message.encode("utf-8", "backslashreplace").decode()
                reply = Failed(code=error.code, message=text, retryable=error.retryable)
            await answer(self._bus, message, reply)
