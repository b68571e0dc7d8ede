"""The `stoker` program against a stand-in for the gateway: what it sends, prints and exits with."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

MODEL = {
    "name": "toy", "model_id": "model-1", "source": "file:///t", "architecture": "LlamaForCausalLM", "dtype": "float32",
    "weight_bytes": 1000, "max_model_len": 128, "kv_cache_bytes": 1024, "slots": 2, "engine": "vllm",
    "keep_alive_s": 60.0, "instances": [], "tiers": [],
}  # fmt: skip
DECISION = {
    "decision_id": "d-1", "term": 2, "model_id": "model-1", "model": "toy", "instance_id": "i-1", "weighed": 9,
    "reason": "the quickest", "chosen": 0, "made_at": "2026-11-21T01:49:27Z", "error": 0.2, "load_error": 0.5,
    "options": [
        {"node": "n1", "devices": [0], "source": "ssd", "origin": "", "how": "free",
         "startup": {"queue_s": 0.0, "room_s": 0.0, "load_s": 1.0, "engine_s": 1.0, "total_s": 2.0, "spread": 0.1,
                     "stages": [{"name": "ssd", "size_bytes": 7, "seconds": 1.0}]}},
        {"node": "n2", "devices": [0, 1], "source": "peer", "origin": "n1", "how": "stop",
         "startup": {"queue_s": 3.0, "room_s": 1.0, "load_s": 120.0, "engine_s": 14.0, "total_s": 137.0}}],
    "outcome": {"queue_s": 0.5, "load_s": 1.0, "engine_s": 1.0, "total_s": 2.5, "source": "ssd", "origin": "",
                "failure": ""},
}  # fmt: skip


@dataclass
class StandIn:
    """Answers with what a test puts in, and keeps what was asked. answers: one after another, before `answer`."""

    url: str = ""
    status: int = 200
    answer: Any = None
    answers: list[Any] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)  # of paths, where they differ from `status`
    stream: list[str] = field(default_factory=list)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.raw_path, await request.json() if request.can_read_body else None))
        if not self.stream:
            answer = self.answers.pop(0) if self.answers else self.answer
            return web.json_response(answer, status=self.statuses.get(request.raw_path, self.status))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in self.stream:
            await response.write(f"data: {chunk}\n\n".encode())
        return response


@pytest.fixture
async def gateway() -> AsyncIterator[StandIn]:
    stand_in = StandIn()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", stand_in.handle)
    async with TestServer(app) as server:
        stand_in.url = str(server.make_url(""))
        yield stand_in


@dataclass
class Ended:
    code: int | None
    out: str
    err: str


async def stoker(*arguments: str, home: Path, given: str = "") -> Ended:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("stoker")),
        *arguments,
        env={"PATH": "/usr/bin:/bin", "STOKER_HOME": str(home)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(given.encode())
    return Ended(process.returncode, out.decode(), err.decode())


def chunk(text: str | None, **more: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text} if text else {}}], **more})


async def test_a_deployment_sends_only_what_was_chosen(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {"model": MODEL, "created": True}
    directory = tmp_path / "my model"
    ended = await stoker(
        "deploy", str(directory), "--name", "toy", "--kv-cache-mib", "2", "--keep-alive", "5", "--url", gateway.url,
        home=tmp_path,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("toy registered: LlamaForCausalLM, float32, 1000 B of weights")
    assert gateway.asked == [
        (
            "POST",
            "/admin/v1/models",
            {"name": "toy", "source": directory.as_uri(), "options": {"kv_cache_bytes": 2097152, "keep_alive_s": 5.0}},
        )
    ]


async def test_a_url_is_deployed_as_it_is_and_named_after_its_last_part(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {"model": MODEL, "created": True}
    ended = await stoker("deploy", "s3://bucket/models/toy/", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert gateway.asked == [
        ("POST", "/admin/v1/models", {"name": "toy", "source": "s3://bucket/models/toy/", "options": {}})
    ]


async def test_a_prefetch_sends_where_to_and_how_urgently(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {"model": "toy", "nodes": ["n1", "n2"], "tier": "ssd", "cancel": False}
    ended = await stoker(
        "prefetch", "toy", "n1", "n2", "--tier", "ssd", "--priority", "2", "--within", "1.5", "--url", gateway.url,
        home=tmp_path,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("toy: prefetch to ssd ordered on n1, n2;")
    wish = {"nodes": ["n1", "n2"], "tier": "ssd", "priority": 2, "budget_ms": 1500}
    assert gateway.asked == [("POST", "/admin/v1/models/toy/prefetch", wish)]


async def test_a_prefetch_is_cancelled_everywhere_or_where_it_is_said(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {"model": "toy", "nodes": [], "tier": "dram", "cancel": True}
    for nodes in ((), ("n1", "n2")):
        ended = await stoker("prefetch", "toy", *nodes, "--cancel", "--json", "--url", gateway.url, home=tmp_path)
        assert (ended.code, json.loads(ended.out)) == (0, gateway.answer)
    assert gateway.asked == [
        ("DELETE", "/admin/v1/models/toy/prefetch", None),
        ("DELETE", "/admin/v1/models/toy/prefetch?node=n1&node=n2", None),
    ]


async def test_a_refusal_is_one_line_and_exit_1(gateway: StandIn, tmp_path: Path) -> None:
    gateway.status = 400
    gateway.answer = {"error": {"message": "/m: shard 2 of 3 is missing", "code": "refused_checkpoint", "param": None}}
    ended = await stoker("deploy", "/m", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.out, ended.err) == (1, "", "stoker: /m: shard 2 of 3 is missing\n")


async def test_json_is_the_answer_as_it_came(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {"models": [MODEL | {"of_a_newer_version": [1]}]}
    ended = await stoker("models", "--json", "--url", gateway.url, home=tmp_path)
    assert json.loads(ended.out) == gateway.answer


async def test_tables_keep_one_line_each_in_a_pipe(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {"models": [MODEL, MODEL | {"name": "x" * 96}]}
    ended = await stoker("models", "--url", gateway.url, home=tmp_path)
    assert len(ended.out.splitlines()) == 3


async def test_a_deleted_model_is_named(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = {}
    ended = await stoker("rm", "toy", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.out) == (0, "toy deleted\n")
    assert gateway.asked == [("DELETE", "/admin/v1/models/toy", None)]


async def test_chat_streams_the_answer_and_times_it(gateway: StandIn, tmp_path: Path) -> None:
    gateway.stream = [
        chunk(None),
        chunk("Par"),
        chunk("is"),
        json.dumps({"choices": [], "usage": {"completion_tokens": 2}}),
        "[DONE]",
    ]
    ended = await stoker("chat", "toy", "Capital?", "--temperature", "0", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.out) == (0, "Paris\n")
    assert "first token after" in ended.err
    assert "2 tokens" in ended.err
    body = gateway.asked[0][2]
    assert body["messages"] == [{"role": "user", "content": "Capital?"}]
    assert (body["model"], body["temperature"], body["stream"]) == ("toy", 0.0, True)
    assert "seed" not in body


async def test_a_conversation_remembers_what_was_said(gateway: StandIn, tmp_path: Path) -> None:
    gateway.stream = [chunk("yes"), "[DONE]"]
    ended = await stoker("chat", "toy", "--url", gateway.url, home=tmp_path, given="one\n\ntwo\n")
    assert (ended.code, ended.out) == (0, "yes\nyes\n")
    said = [message["content"] for message in gateway.asked[1][2]["messages"]]
    assert said == ["one", "yes", "two"]


async def test_an_error_in_mid_stream_is_an_error(gateway: StandIn, tmp_path: Path) -> None:
    gateway.stream = [chunk("Par"), json.dumps({"error": {"message": "the instance died", "code": "instance_lost"}})]
    ended = await stoker("chat", "toy", "x", "--url", gateway.url, home=tmp_path)
    assert ended.code == 1
    assert ended.err.endswith("stoker: the instance died\n")


async def test_a_stream_that_breaks_off_is_an_error(gateway: StandIn, tmp_path: Path) -> None:
    gateway.stream = [chunk("Par")]
    ended = await stoker("chat", "toy", "x", "--url", gateway.url, home=tmp_path)
    assert ended.code == 1
    assert "broke off" in ended.err


async def test_without_a_system_the_commands_say_so(tmp_path: Path) -> None:
    for command in (["ps"], ["nodes"], ["events"], ["chat", "m", "x"]):
        ended = await stoker(*command, home=tmp_path)
        assert ended.code == 1
        assert (
            ended.err
            == f"stoker: no system runs in {tmp_path}; start one with `stoker up`, or name another with --url or STOKER_HOME\n"
        )


async def test_wrong_usage_exits_2(tmp_path: Path) -> None:
    for arguments in (["nope"], ["chat"], ["up", "--gateway-port", "70000"], ["up", "--cpu-slots", "0"]):
        ended = await stoker(*arguments, home=tmp_path)
        assert ended.code == 2, arguments
        assert ended.err


async def test_every_command_has_an_example_in_its_help(tmp_path: Path) -> None:
    for command in ("up", "deploy", "models", "ps", "nodes", "drain", "why", "rm", "chat", "events", "doctor"):
        ended = await stoker(command, "--help", home=tmp_path)
        assert ended.code == 0
        assert f"stoker {command}" in ended.out.split("\n", 2)[2]


async def test_help_loads_no_heavy_library() -> None:
    code = "import sys, stoker_cli.main; print([m for m in ('aiohttp', 'nats', 'sqlalchemy', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out == b"[]\n"


LEFT = {"node": "n1", "draining": True, "drained": False, "live": True,
        "instances": [{"instance_id": "i-1", "running": 2}, {"instance_id": "i-2"}]}  # fmt: skip


async def test_a_drain_says_what_is_left_until_nothing_is(gateway: StandIn, tmp_path: Path) -> None:
    one = {**LEFT, "instances": LEFT["instances"][1:]}
    gateway.answers = [LEFT, LEFT, one, {**LEFT, "instances": [], "drained": True}]
    ended = await stoker("drain", "n1", "--url", gateway.url, home=tmp_path)
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "n1: 2 instances left, 1 of them busy",
        "n1: 1 instance left",
        "n1: nothing is left there",
    ]
    assert [method for method, _, _ in gateway.asked] == ["POST", "GET", "GET", "GET"]
    assert {path for _, path, _ in gateway.asked} == {"/admin/v1/nodes/n1/drain"}


async def test_a_drain_need_not_be_waited_for_and_can_be_undone(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answer = LEFT
    ended = await stoker("drain", "n1", "--no-wait", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.out) == (0, "n1: 2 instances left, 1 of them busy\n")
    ended = await stoker("drain", "n1", "--undo", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.out) == (0, "n1 may be used again\n")
    assert gateway.asked[-1][:2] == ("DELETE", "/admin/v1/nodes/n1/drain")


async def test_a_drain_that_somebody_undoes_is_an_error(gateway: StandIn, tmp_path: Path) -> None:
    gateway.answers = [LEFT, {**LEFT, "draining": False}]
    ended = await stoker("drain", "n1", "--url", gateway.url, home=tmp_path)
    assert ended.code == 1
    assert "somebody undid it" in ended.err


async def test_why_asks_for_a_model_and_then_for_an_instance(gateway: StandIn, tmp_path: Path) -> None:
    gateway.statuses = {"/admin/v1/models/i-1/decisions?limit=3": 404}
    gateway.answers = [{"error": {"message": "no", "code": "model_not_found"}}, {"decisions": [DECISION]}]
    ended = await stoker("why", "i-1", "--url", gateway.url, home=tmp_path)
    assert ended.code == 0
    assert "started i-1" in ended.out
    assert "off by 20%" in ended.out
    assert [path for _, path, _ in gateway.asked] == [
        "/admin/v1/models/i-1/decisions?limit=3",
        "/admin/v1/instances/i-1/decisions",
    ]
    gateway.answers = [{"decisions": [DECISION]}]
    ended = await stoker("why", "toy", "--last", "1", "--json", "--url", gateway.url, home=tmp_path)
    assert json.loads(ended.out) == {"decisions": [DECISION]}


async def test_why_of_what_is_neither_model_nor_instance_is_an_error(gateway: StandIn, tmp_path: Path) -> None:
    gateway.status, gateway.answer = 404, {"error": {"message": "no", "code": "instance_not_found"}}
    ended = await stoker("why", "nope", "--url", gateway.url, home=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert "no model 'nope'" in ended.err
