"""Fuzz the parser of safetensors headers and the planner behind it.

    python tests/fuzz/fuzz_header.py -max_total_time=60

Whatever the bytes, the parser gives a Shard or raises CorruptCheckpoint, and all that it gives can be read: plans cover
it, for all tensors and for every other one. Any other exception, and whatever takes longer than TIMEOUT_S, is reported
with the input that shows it. Without a corpus directory among the arguments it begins with the malformed files of the
unit tests. Needs atheris.
"""

import inspect
import json
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.malformed import MALFORMED, entry, file

from stoker_checkpoint import header, plan
from stoker_checkpoint.header import DTYPE_BITS, PREFIX_BYTES
from stoker_checkpoint.manifest import Manifest
from stoker_core.errors import CorruptCheckpoint

TIMEOUT_S = 5
INPUT_BYTES_MAX = 2**16
PLANNED_BYTES_MAX = 2**34
"""Of one shard: more than a thousand chunks show nothing new."""
WHOLE, HEADER, ENTRIES = b"\0", b"\1", b"\2"
"""The first byte of an input: what the others are."""
TOKENS = ["dtype", "shape", "data_offsets", "__metadata__", *DTYPE_BITS, '":{"', '"],"', "[0,0]", "},", "\\ud800"]


def one_input(data: bytes) -> None:
    kind, content = data[:1], data[1:]
    if kind == WHOLE:
        parse_and_plan(content, len(content))
    elif kind == HEADER:  # data is never looked at: a file may claim any amount of it
        claimed, text = int.from_bytes(content[:6], "little"), content[6:]
        prefix = len(text).to_bytes(PREFIX_BYTES, "little")
        parse_and_plan(prefix + text, PREFIX_BYTES + len(text) + claimed)
    elif kind == ENTRIES:
        parse_and_plan(*from_entries(atheris.FuzzedDataProvider(content)))


def from_entries(draw: atheris.FuzzedDataProvider) -> tuple[bytes, int]:
    """A file that is nearly valid, and the size it claims."""
    entries, end = {}, 0
    for number in range(draw.ConsumeIntInRange(0, 40)):
        dtype = draw.PickValueInList(list(DTYPE_BITS))
        shape = [
            draw.ConsumeIntInRange(0, 2 ** draw.ConsumeIntInRange(0, 27)) for _ in range(draw.ConsumeIntInRange(0, 3))
        ]
        size = DTYPE_BITS[dtype]
        for length in shape:
            size *= length
        begin = end + draw.PickValueInList([0, 0, 0, 0, 0, 0, 0, 1, -1])
        end = begin + size // 8 + draw.PickValueInList([0, 0, 0, 0, 0, 0, 0, 1, -1])
        entries[f"t{number}"] = entry(dtype, shape, (begin, end))
    content = file(entries)
    return content, len(content) + max(0, end + draw.PickValueInList([0, 0, 0, 1, -1]))


def parse_and_plan(content: bytes, file_bytes: int) -> None:
    try:
        length = header.header_length("fuzz", content[:PREFIX_BYTES], file_bytes)
        shard = header.parse_header("fuzz", "fuzz", content[PREFIX_BYTES : PREFIX_BYTES + length], file_bytes)
    except CorruptCheckpoint:
        return
    if file_bytes > PLANNED_BYTES_MAX:
        return
    manifest = Manifest(shards=(shard,))
    assert plan.plan_reads(manifest).read_bytes == file_bytes
    names = [tensor.name for tensor in shard.tensors][::2]
    some = plan.plan_reads(manifest, names)
    assert some.offsets.keys() == set(names)
    assert some.read_bytes <= file_bytes


def seeds() -> list[bytes]:
    valid = file({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", (2, 3), (8, 20))})
    files = [data for data, _ in MALFORMED.values() if len(data) < INPUT_BYTES_MAX]
    claimed = (20).to_bytes(6, "little")
    return [
        *(WHOLE + data for data in [*files, valid + b"\0" * 20]),
        *(HEADER + claimed + data[PREFIX_BYTES:] for data in [*files, valid]),
        *(ENTRIES + bytes(range(begin, 256)) for begin in range(0, 256, 16)),
    ]


def instrument() -> None:
    """Not atheris.instrument_imports: the finder of an editable installation gets in before it."""
    for module in (header, plan):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def main() -> None:
    instrument()
    arguments = [f"-timeout={TIMEOUT_S}", f"-max_len={INPUT_BYTES_MAX}", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens"
        tokens.write_text("".join(json.dumps(token) + "\n" for token in TOKENS))
        arguments.append(f"-dict={tokens}")
        if all(argument.startswith("-") for argument in sys.argv[1:]):
            corpus = Path(directory) / "corpus"
            corpus.mkdir()
            for number, seed in enumerate(seeds()):
                (corpus / str(number)).write_bytes(seed)
            arguments.append(str(corpus))
        atheris.Setup([sys.argv[0], *arguments], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
