"""A function per subject: read state → decide → act → answer."""

from __future__ import annotations

from dataclasses import dataclass

from stoker_bus.port import Bus, Message, answer
from stoker_contracts.codec import decode
from stoker_contracts.control import (
    AnnounceTerm,
    CommandReply,
    Done,
    DrainNode,
    Failed,
    PrepareModel,
    StartInstance,
    StopInstance,
    TermReply,
    WorkerStatus,
)
from stoker_core.errors import InvalidMessage, StorageFailed
from stoker_core.logging import get_logger
from stoker_core.tracing import span
from stoker_worker.loops import StatusReporter
from stoker_worker.manager import InstanceManager
from stoker_worker.ports import TermStore
from stoker_worker.prepare import Preparer
from stoker_worker.state import WorkerState

log = get_logger("handlers")


@dataclass(frozen=True, slots=True)
class Handlers:
    bus: Bus
    state: WorkerState
    manager: InstanceManager
    preparer: Preparer
    terms: TermStore
    reporter: StatusReporter

    async def start(self, message: Message) -> None:
        reply: CommandReply
        try:
            command = decode(StartInstance, message.data)
        except InvalidMessage as error:
            reply = Failed(code=error.code, message=error.message)
        else:
            with span("worker.start", headers=message.headers, instance=command.instance_id):
                reply = self._start(command)
                log.info("start", instance=command.instance_id, model=command.model.name, reply=_text(reply))
        await answer(self.bus, message, reply)

    def _start(self, command: StartInstance) -> CommandReply:
        refused = self.state.check_boot(command.boot_id) or self._check_term(command.term)
        if refused:
            return refused
        if command.instance_id in self.state.instances:
            return Done()
        refused = self.state.check_start(command)
        if refused:
            return refused
        self.manager.start(command)
        return Done()

    async def stop(self, message: Message) -> None:
        command = decode(StopInstance, message.data)
        refused = self.state.check_boot(command.boot_id) or self._check_term(command.term)
        reply: CommandReply = refused or self.state.check_stop(command) or Done()
        if isinstance(reply, Done) and not await self.manager.stop(
            command.instance_id, only_if_idle=command.only_if_idle
        ):
            reply = Failed(code="busy", message=f"{command.instance_id} has requests in hand", retryable=True)
        log.info("stop", instance=command.instance_id, reason=command.reason, reply=_text(reply))
        await answer(self.bus, message, reply)

    async def prepare(self, message: Message) -> None:
        command = decode(PrepareModel, message.data)
        refused = self.state.check_boot(command.boot_id) or self._check_term(command.term)
        if not refused:
            self.preparer.want(command.model)
        await answer(self.bus, message, refused or Done())

    async def drain(self, message: Message) -> None:
        command = decode(DrainNode, message.data)
        refused = self.state.check_boot(command.boot_id) or self._check_term(command.term)
        if not refused:
            self.state.draining = command.draining
            self.reporter.changed()
        reply: CommandReply = refused or Done()
        log.info("drain" if command.draining else "undrain", term=command.term, reply=_text(reply))
        await answer(self.bus, message, reply)

    async def term(self, message: Message) -> None:
        command = decode(AnnounceTerm, message.data)
        reply: TermReply = self._check_term(command.term) or self.reporter.status()
        log.info("term_announced", term=command.term, leader=command.leader_id, reply=_text(reply))
        await answer(self.bus, message, reply)

    def _check_term(self, term: int) -> Failed | None:
        if term > self.state.term:
            try:
                self.terms.save(term)  # before it is obeyed, or the next boot might obey the leader before
            except OSError as error:
                return Failed(code=StorageFailed.code, message=f"term {term} cannot be saved: {error}", retryable=True)
        return self.state.check_term(term)


def _text(reply: CommandReply | WorkerStatus) -> str:
    return f"{reply.code}: {reply.message}" if isinstance(reply, Failed) else "done"
