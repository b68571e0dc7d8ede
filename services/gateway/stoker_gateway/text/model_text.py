"""One model's tokenizer and chat template. Blocking calls: for threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker_core.errors import InvalidRequest, TokenizerFailed
from stoker_gateway.text.detokenise import Decode


class ModelText:
    """Built by `load`; used from several threads at once."""

    def __init__(self, tokenizer: Any, *, stop_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()  # for tokenizers in Python, which keep state while they encode
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a chat, ready for the answer. Raises InvalidRequest if the model's template refuses it."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        try:
            prompt: str = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is the model's own program; any failure is its answer
            raise InvalidRequest(f"the model's chat template refuses the messages: {error}", "messages") from error
        return prompt

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """add_special_tokens: what the tokenizer puts around plain text; a rendered chat has them already."""
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    @property
    def decode(self) -> Decode:
        if self._backend is not None:
            backend = self._backend
            return lambda ids: backend.decode(ids, skip_special_tokens=True)
        tokenizer = self._tokenizer
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load(name: str, directory: Path) -> ModelText:
    """Read tokenizer, template and end tokens from a model's small files. Runs no code of the model's.

    Raises TokenizerFailed.
    """
    from transformers import AutoTokenizer  # seconds; paid once, in the thread that calls

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever these files make the library raise
        raise TokenizerFailed(name, f"{type(error).__name__}: {error}") from error
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    configured = [_end_tokens(name, directory / file) for file in ("generation_config.json", "config.json")]
    ends = {*own, *configured[0], *configured[1]}
    return ModelText(tokenizer, stop_token_ids=tuple(sorted(ends)))


def _end_tokens(name: str, file: Path) -> list[int]:
    """`eos_token_id` of a configuration: one id, a list, or none."""
    if not file.exists():
        return []
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise TokenizerFailed(name, f"{file.name}: {error}") from error
    found: list[int] = []
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        value = part.get("eos_token_id") if isinstance(part, dict) else None
        found += [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]
    return found


def import_library() -> None:
    """Pay transformers' import before the first model needs it."""
    import transformers

    transformers.AutoTokenizer  # noqa: B018 - the package imports its parts when they are named
