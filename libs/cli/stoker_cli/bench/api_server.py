"""vLLM's own OpenAI server, from process start to first token: what a cold start costs without Stoker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from stoker_cli.process import spawn, tail
from stoker_core.errors import SetupFailed

_POLL_S = 0.1
_STOP_S = 20.0


async def first_token_s(
    directory: Path, *, model: str, body: Mapping[str, Any], port: int, kv_cache_bytes: int, max_model_len: int,
    work: Path, timeout_s: float,
) -> float:  # fmt: skip
    """Start `api_server --enforce-eager`, ask until it answers, end it; seconds from start to the first token.

    Raises SetupFailed if it dies or gives no token within timeout_s.
    """
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("STOKER_")},
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # As warm as ours: without it every start would inspect the model's class anew.
        "VLLM_CACHE_ROOT": str(work / "vllm"),
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)),
        *("--served-model-name", model, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-model-len", str(max_model_len), "--kv-cache-memory-bytes", str(kv_cache_bytes)),
    ]
    log = work / "api_server.log"
    began_s = time.monotonic()
    with log.open("wb") as output:
        child = spawn(command, env=environment, output=output)
    try:
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            while child.running:
                try:
                    await _first_token(session, f"http://127.0.0.1:{port}", body)
                except aiohttp.ClientError:
                    await asyncio.sleep(_POLL_S)
                else:
                    return time.monotonic() - began_s
        raise SetupFailed(f"vLLM's api_server ended with {await child.wait()}: {'; '.join(tail(log))}")
    except TimeoutError as error:
        raise SetupFailed(f"vLLM's api_server gave no token within {timeout_s:g} s; see {log}") from error
    finally:
        await child.stop(signal.SIGTERM, _STOP_S)


async def _first_token(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> None:
    async with session.post(f"{url}/v1/chat/completions", json=dict(body)) as response:
        response.raise_for_status()
        if not await first_content(response):
            raise aiohttp.ClientPayloadError("the stream ended without a token")


async def first_content(response: aiohttp.ClientResponse) -> bool:
    """Read a chat stream up to its first piece of text; False if it ends without one."""
    async for line in response.content:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or [{}]
            if choices[0].get("delta", {}).get("content"):
                return True
    return False
