"""One answer as it comes: text pieces for whoever reads it, a cancel for the instance when nobody does any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stoker_gateway.openai.answers import Usage
from stoker_gateway.placing import Job, Placing
from stoker_gateway.streams import Stream, Streams
from stoker_gateway.text.compose import Composer


class Generation:
    def __init__(self, job: Job, stream: Stream, composer: Composer) -> None:
        self._prompt_tokens = len(job.prompt)
        self._stream = stream
        self._composer = composer

    @property
    def finish_reason(self) -> str:
        """Once `piece` returned None."""
        assert self._composer.finish_reason is not None
        return self._composer.finish_reason

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._composer.completion_tokens)

    async def piece(self) -> str | None:
        """The next text, never empty; None once the answer is complete.

        Raises InstanceLost, EngineFailed, ClientTooSlow, after all text that came before.
        """
        session, changed = self._stream.session, self._stream.changed
        while self._composer.finish_reason is None:
            changed.clear()
            tokens = session.take()
            if tokens or session.finish is not None:
                if text := self._composer.push(tokens, session.finish):
                    return text
            elif session.failure is not None:
                raise session.failure
            else:
                await changed.wait()
        return None


class Generations:
    def __init__(self, placing: Placing, streams: Streams) -> None:
        self._placing = placing
        self._streams = streams

    @asynccontextmanager
    async def open(self, job: Job, composer: Composer) -> AsyncIterator[Generation]:
        """Wait for an instance, as Placing.place does. Leaving the block early cancels the request there."""
        stream = await self._placing.place(job)
        try:
            yield Generation(job, stream, composer)
        finally:
            await self._streams.close(stream)
