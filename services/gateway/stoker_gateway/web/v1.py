"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from stoker_core.clock import Clock
from stoker_core.errors import ClientTooSlow, StokerError
from stoker_gateway.catalogue import Catalogue
from stoker_gateway.generation import Generation, Generations
from stoker_gateway.intake import Intake
from stoker_gateway.openai.answers import Shape, event, model_card
from stoker_gateway.openai.errors import body_of, status_of
from stoker_gateway.openai.requests import ChatRequest, CompletionRequest, parse_chat, parse_completion
from stoker_gateway.prepare import Preparer
from stoker_gateway.web.exchange import EXCHANGE, Exchange
from stoker_gateway.web.middleware import CLIENT_GONE, json_response

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True)
class OpenAiRoutes:
    catalogue: Catalogue
    preparer: Preparer
    generations: Generations
    intake: Intake
    clock: Clock
    client_stall_s: float

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name}", self.model),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.complete),
        ]

    async def models(self, request: web.Request) -> web.StreamResponse:
        return json_response({"object": "list", "data": [model_card(spec) for spec in self.catalogue.all()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        return json_response(model_card(self.catalogue.get(request.match_info["name"])))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        with self.intake.request():
            return await self._answer(request, parse_chat(await request.read()))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        with self.intake.request():
            return await self._answer(request, parse_completion(await request.read()))

    async def _answer(self, request: web.Request, asked: ChatRequest | CompletionRequest) -> web.StreamResponse:
        exchange = request[EXCHANGE]
        params = asked.params
        spec = self.catalogue.get(params.model)
        exchange.model = spec.name
        job, composer = await self.preparer.prepare(exchange.request_id, asked, spec)
        exchange.prepared()
        chat = isinstance(asked, ChatRequest)
        shape = Shape(
            chat=chat,
            answer_id=f"{'chatcmpl' if chat else 'cmpl'}-{exchange.request_id.removeprefix('req-')}",
            created_s=int(self.clock.utc().timestamp()),
            model=spec.name,
            include_usage=params.include_usage,
        )
        async with self.generations.open(job, composer) as generation:
            exchange.accepted()
            if params.stream:
                return await self._streamed(request, exchange, shape, generation)
            return await _whole(exchange, shape, generation)

    async def _streamed(
        self, request: web.Request, exchange: Exchange, shape: Shape, generation: Generation
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        await response.prepare(request)
        try:
            try:
                await self._write_pieces(response, exchange, shape, generation)
            except StokerError as error:
                # The head said 200 already: the error travels as an event, and the missing end mark says "incomplete".
                exchange.error, exchange.status = error.code, status_of(error.code)
                await self._write(response, event(body_of(error)))
        except ConnectionError:
            exchange.status = CLIENT_GONE
        except TimeoutError:
            exchange.error, exchange.status = ClientTooSlow.code, CLIENT_GONE
            if request.transport is not None:
                request.transport.abort()
        finally:
            exchange.usage = generation.usage
        return response

    async def _write_pieces(
        self, response: web.StreamResponse, exchange: Exchange, shape: Shape, generation: Generation
    ) -> None:
        head = shape.first()
        while (piece := await generation.piece()) is not None:
            exchange.text()
            await self._write(response, head + shape.delta(piece))
            head = b""
        await self._write(response, head + shape.last(generation.finish_reason, generation.usage))
        await response.write_eof()

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        """Raises TimeoutError if the client takes nothing for client_stall_s, ConnectionError if it is gone."""
        async with asyncio.timeout(self.client_stall_s):
            await response.write(data)


async def _whole(exchange: Exchange, shape: Shape, generation: Generation) -> web.StreamResponse:
    pieces = []
    while (piece := await generation.piece()) is not None:
        exchange.text()
        pieces.append(piece)
    exchange.usage = generation.usage
    return json_response(shape.whole("".join(pieces), generation.finish_reason, generation.usage))
