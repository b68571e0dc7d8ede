"""A small byte-level BPE tokenizer in Hugging Face's files, for models that tests make up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2; the last ends an answer."""
END_ID = 2
FIRST_BYTE_ID = len(SPECIALS)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ["system", "user", "assistant"] %}
{{- raise_exception("unknown role: " + message.role) }}
{%- endif %}
{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""


def build_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Specials, then all 256 bytes, then merges of two characters up to exactly `vocab_size` entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not len(SPECIALS) + len(alphabet) <= vocab_size <= 32_768:
        raise ValueError(f"vocab_size {vocab_size} must be from {len(SPECIALS) + len(alphabet)} to 32768")
    words = [*SPECIALS, *alphabet]
    letters = [*"etaoinshrdlucmfwygpbvkqxjz", "Ġ"]  # "Ġ" is the byte-level spelling of a space
    pairs = dict.fromkeys(itertools.chain(itertools.product(letters, repeat=2), itertools.product(alphabet, repeat=2)))
    merges = list(itertools.islice(pairs, vocab_size - len(words)))
    words += [a + b for a, b in merges]

    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def write_tokenizer(directory: Path, vocab_size: int = 512) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja (ChatML).

    Every id below vocab_size decodes. `<|im_end|>` is the end of sequence. Any text encodes and decodes unchanged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (directory / "special_tokens_map.json").write_text(json.dumps(specials, indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer
