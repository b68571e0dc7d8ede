"""From a validated body to tokens and sampling: template and tokenizer run in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from stoker_contracts.inference import Sampling
from stoker_contracts.models import ModelSpec
from stoker_core.errors import InvalidRequest, PromptTooLong
from stoker_gateway.openai.requests import ChatRequest, CompletionRequest, Params
from stoker_gateway.placing import Job
from stoker_gateway.text.compose import Composer
from stoker_gateway.text.model_text import ModelText
from stoker_gateway.texts import Texts


class Preparer:
    def __init__(self, texts: Texts, threads: Executor) -> None:
        self._texts = texts
        self._threads = threads

    async def prepare(
        self, request_id: str, request: ChatRequest | CompletionRequest, spec: ModelSpec
    ) -> tuple[Job, Composer]:
        """Raises InvalidRequest (what the template refuses), PromptTooLong, TokenizerFailed, DatabaseUnavailable."""
        text = await self._texts.get(spec)
        prompt = await self._tokens(request, text, spec)
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        if (highest := max(prompt, default=0)) >= spec.vocab_size:  # also a tokenizer may know more than the model
            raise InvalidRequest(f"{field}: token id {highest} is outside the vocabulary of {spec.vocab_size}", field)
        sampling = sampling_of(request.params, len(prompt), spec, text.stop_token_ids, field=field)
        composer = Composer(text.decode, stops=request.params.stop, end_ids=sampling.stop_token_ids)
        return Job(request_id, spec, prompt, sampling), composer

    async def _tokens(
        self, request: ChatRequest | CompletionRequest, text: ModelText, spec: ModelSpec
    ) -> Sequence[int]:
        loop = asyncio.get_running_loop()
        if isinstance(request, ChatRequest):
            return await loop.run_in_executor(self._threads, _chat_tokens, text, request)
        if isinstance(request.prompt, str):
            prompt = request.prompt
            tokens: Sequence[int] = await loop.run_in_executor(
                self._threads, lambda: text.encode(prompt, add_special_tokens=True)
            )
        else:
            tokens = request.prompt
        if not tokens:
            raise InvalidRequest("prompt: must hold at least one token", "prompt")
        return tokens


def _chat_tokens(text: ModelText, request: ChatRequest) -> list[int]:
    return text.encode(text.render(request.messages), add_special_tokens=False)


def sampling_of(
    params: Params, prompt_tokens: int, spec: ModelSpec, end_ids: tuple[int, ...], *, field: str
) -> Sampling:
    """Raises PromptTooLong unless prompt and completion fit the model's context."""
    left = spec.max_model_len - prompt_tokens
    if left < 1:
        raise PromptTooLong(
            f"this model's context is {spec.max_model_len} tokens, one of them for the answer at least; "
            f"the prompt has {prompt_tokens}",
            field,
        )
    if params.max_tokens is not None and params.max_tokens > left:
        raise PromptTooLong(
            f"this model's context is {spec.max_model_len} tokens; the prompt has {prompt_tokens} "
            f"and max_tokens asks for {params.max_tokens} more",
            "max_tokens",
        )
    return Sampling(
        max_tokens=left if params.max_tokens is None else params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        stop_token_ids=() if params.ignore_eos else end_ids,
        ignore_eos=params.ignore_eos,
    )
