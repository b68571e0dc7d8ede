"""Tokenizers and chat templates as transformers loads them from a model's small files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.fake_instance import model_spec
from tests.support.gateway_rig import tokenizer_files
from tests.support.tiny_tokenizer import END_ID, write_tokenizer

from stoker_core.errors import InvalidRequest, TokenizerFailed
from stoker_db.memory import MemoryDatabase
from stoker_db.ports import ModelFile
from stoker_gateway.text.model_text import ModelText, load
from stoker_gateway.texts import TokenizerCache


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (directory / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    return load("tiny", directory)


def test_end_tokens_come_from_tokenizer_and_configurations(text: ModelText) -> None:
    assert text.stop_token_ids == (0, END_ID, 7)


def test_a_chat_is_rendered_with_the_models_template(text: ModelText) -> None:
    rendered = text.render([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text.decode(text.encode(rendered, add_special_tokens=False)) == "user\nhi\nassistant\n"


def test_what_the_template_refuses_names_the_messages(text: ModelText) -> None:
    with pytest.raises(InvalidRequest, match="unknown role") as caught:
        text.render([{"role": "developer", "content": "hi"}])
    assert caught.value.param == "messages"


def test_files_that_make_no_tokenizer_are_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerFailed):
        load("broken", tmp_path)


def test_a_model_without_a_template_refuses_chats_by_name(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        load("plain", tmp_path).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


async def test_the_cache_builds_once_and_drops_the_least_used(tmp_path: Path) -> None:
    database, specs = MemoryDatabase(), [model_spec(f"m{i}") for i in range(3)]
    for spec in specs:
        await database.models.add(spec, tokenizer_files())
    cache = TokenizerCache(database.models, tmp_path / "models", models_max=2)
    await cache.start()
    try:
        first, again = await asyncio.gather(cache.get(specs[0]), cache.get(specs[0]))
        assert first is again
        await cache.get(specs[1])
        await cache.get(specs[0])
        await cache.get(specs[2])  # drops specs[1]
        assert await cache.get(specs[0]) is first
        assert await cache.get(specs[1]) is not None
        kept = {path.name for path in (tmp_path / "models").iterdir()}
        assert specs[1].model_id in kept
    finally:
        cache.close()


async def test_a_client_that_gives_up_does_not_fail_the_others_that_wait_for_the_tokenizer(tmp_path: Path) -> None:
    database, spec = MemoryDatabase(), model_spec()
    await database.models.add(spec, tokenizer_files())
    cache = TokenizerCache(database.models, tmp_path / "models", models_max=2)
    await cache.start()
    try:
        leaving, staying = asyncio.ensure_future(cache.get(spec)), asyncio.ensure_future(cache.get(spec))
        await asyncio.sleep(0)
        leaving.cancel()
        assert (await staying).stop_token_ids == (END_ID,)
    finally:
        cache.close()


async def test_a_file_that_leaves_the_models_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def files(model_id: str, *, with_content: bool) -> list[ModelFile]:
        return [*tokenizer_files(), ModelFile(path="../../stray.json", size_bytes=2, content=b"{}")]

    models = MemoryDatabase().models
    monkeypatch.setattr(models, "files", files)
    cache = TokenizerCache(models, tmp_path / "models", models_max=2)
    await cache.start()
    try:
        with pytest.raises(TokenizerFailed, match="leaves"):
            await cache.get(model_spec())
        assert not (tmp_path / "stray.json").exists()
    finally:
        cache.close()
