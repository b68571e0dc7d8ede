"""Readers of public trace formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from stoker_core.errors import InvalidTrace, InvalidWorkload
from stoker_sim.dice import Dice
from stoker_sim.workload import (
    SHAREGPT_LIKE,
    Arrival,
    FileLengths,
    at_rate,
    even,
    read_azure_functions,
    read_azure_llm,
    read_mooncake,
)
from stoker_sim.workload.reading import LINE_BYTES_MAX

LLM = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MODELS = ["a", "b"]

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def one(text: str) -> Path:
        path = tmp_path / "trace"
        path.write_text(text)
        return path

    return one


def azure_llm(path: Path) -> Iterator[Arrival]:
    return read_azure_llm(path, even(MODELS), Dice(1))


def mooncake(path: Path) -> Iterator[Arrival]:
    return read_mooncake(path, even(MODELS), Dice(1))


def functions(path: Path, seed: int = 1, **options: object) -> list[Arrival]:
    return list(read_azure_functions(path, MODELS, SHAREGPT_LIKE, Dice(seed), **options))  # type: ignore[arg-type]


def lengths(path: Path) -> Iterator[object]:
    yield FileLengths(path)


def table(prefix: str, *rows: list[int], skip: int = 0) -> str:
    """A file of functions f0, f1, …; skip: a minute whose column is left out."""
    minutes = [m for m in range(1, len(rows[0]) + 1) if m != skip]
    header = ["HashOwner", "HashApp", "HashFunction", *(f"{prefix}{m}" for m in minutes)]
    lines = [["o", "a", f"f{i}", *(str(row[m - 1]) for m in minutes)] for i, row in enumerate(rows)]
    return "\n".join(",".join(line) for line in [header, *lines]) + "\n"


def test_azure_llm_requests_come_at_their_distance_from_the_first(write: Write) -> None:
    text = LLM + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    read = list(azure_llm(write(text)))
    assert [(round(a.at_s, 6), a.prompt_tokens, a.output_tokens) for a in read] == [
        (0.0, 374, 44),
        (4.314579, 396, 109),
    ]


def test_azure_llm_of_the_next_year_has_time_zones_and_may_have_its_columns_in_another_order(write: Write) -> None:
    text = "\ufeffGeneratedTokens,TIMESTAMP,ContextTokens\r\n5,2024-05-10 00:00:00.5+00:00,7\r\n6,2024-05-10 01:00:01+01:00,8\r\n"
    read = list(azure_llm(write(text)))
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in read] == [(0.0, 7, 5), (0.5, 8, 6)]


def test_mooncake_times_are_milliseconds(write: Write) -> None:
    text = (
        '{"timestamp": 0, "input_length": 10, "output_length": 2, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 1500, "input_length": 20, "output_length": 0}\n'
    )
    read = list(mooncake(write(text)))
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in read] == [(0.0, 10, 2), (1.5, 20, 1)]


@pytest.mark.parametrize("prefix", ["", "minute_"])
def test_functions_become_models_in_turn_and_every_call_stays_in_its_minute(write: Write, prefix: str) -> None:
    read = functions(write(table(prefix, [2, 0, 3], [0, 5, 0], [1, 0, 4])))
    assert Counter((a.model, int(a.at_s // 60)) for a in read) == {("a", 0): 3, ("b", 1): 5, ("a", 2): 7}
    assert [a.at_s for a in read] == sorted(a.at_s for a in read)


def test_calls_spread_over_their_minute_by_the_seed(write: Write) -> None:
    path = write(table("", [2000]))
    read = functions(path)
    assert read == functions(path) != functions(path, seed=2)
    assert all(abs(sum(1 for a in read if a.at_s // 10 == i) - 333) < 70 for i in range(6))


def test_a_part_of_the_day_begins_at_0(write: Write) -> None:
    read = functions(write(table("", [9, 2, 3, 9])), first_minute=2, minutes=2)
    assert Counter(int(a.at_s // 60) for a in read) == {0: 2, 1: 3}


@pytest.mark.parametrize("rate", [0.11, 20.0])
def test_functions_scaled_to_a_rate_keep_their_shape(write: Write, rate: float) -> None:
    read = functions(write(table("", [100] * 30 + [300] * 30)), rate_per_s=rate)
    assert len(read) / 3600 == pytest.approx(rate, rel=0.02)
    assert sum(1 for a in read if a.at_s >= 1800) / len(read) == pytest.approx(0.75, abs=0.02)


def test_a_trace_at_another_rate_keeps_the_proportions_of_its_gaps(write: Write) -> None:
    text = LLM + "".join(f"2023-11-16 18:00:{s:02},5,5\n" for s in (3, 4, 7))
    path = write(text)
    assert [a.at_s for a in at_rate(lambda: azure_llm(path), 5.0)] == pytest.approx([0.0, 0.1, 0.4])
    with pytest.raises(InvalidWorkload):
        next(at_rate(lambda: azure_llm(path), 0.0))
    path = write(LLM + "2023-11-16 18:00:03,5,5\n")
    with pytest.raises(InvalidWorkload):
        next(at_rate(lambda: azure_llm(path), 1.0))


def test_lengths_of_a_file_are_its_pairs(write: Write) -> None:
    path = write("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n290,905,1195,0.3\n")
    dice = Dice(3)
    read = FileLengths(path)
    assert len(read) == 2
    assert {read.draw(dice) for _ in range(50)} == {(74, 918), (290, 905)}


@pytest.mark.parametrize(
    ("read", "text", "line", "column"),
    [
        (azure_llm, "", 0, ""),
        (azure_llm, "TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens"),
        (azure_llm, LLM.strip() + ",Model\n", 1, "Model"),
        (azure_llm, LLM.strip() + ",TIMESTAMP\n", 1, "TIMESTAMP"),
        (azure_llm, LLM + "2023-11-16 18:00:00,5\n", 2, ""),
        (azure_llm, LLM + "yesterday,5,5\n", 2, "TIMESTAMP"),
        (azure_llm, LLM + "2023-11-16 18:00:00,-5,5\n", 2, "ContextTokens"),
        (azure_llm, LLM + "2023-11-16 18:00:00,5,1e99\n", 2, "GeneratedTokens"),
        (azure_llm, LLM + "2023-11-16 18:00:00,5,99999999999999999999\n", 2, "GeneratedTokens"),
        (azure_llm, LLM + "\n2023-11-16 18:00:01,5,5\n2023-11-16 18:00:00,5,5\n", 4, "TIMESTAMP"),
        (azure_llm, LLM + '"2023-11-16,5,5\n', 2, ""),
        (azure_llm, LLM + "5" * (LINE_BYTES_MAX + 1), 2, ""),
        (mooncake, "no json\n", 1, ""),
        (mooncake, '{"timestamp": 0, "input_length": 1}\n', 1, "output_length"),
        (mooncake, '{"timestamp": 0, "input_length": 1, "output_length": 1, "model": "x"}\n', 1, "model"),
        (mooncake, '{"timestamp": 0, "input_length": -1, "output_length": 1}\n', 1, "input_length"),
        (mooncake, '{"timestamp": "0", "input_length": 1, "output_length": 1}\n', 1, "timestamp"),
        (
            mooncake,
            "".join(f'{{"timestamp": {t}, "input_length": 1, "output_length": 1}}\n' for t in (5, 4)),
            2,
            "timestamp",
        ),
        (functions, "HashFunction,1,2,hour_3\n", 1, "hour_3"),
        (functions, "HashApp,1,2\n", 1, "HashFunction"),
        (functions, "HashFunction,1,minute_1\n", 1, "minute_1"),
        (functions, "HashFunction,1441\n", 1, "1441"),
        (functions, table("", [1, 1, 1], skip=2), 1, "minute_2"),
        (functions, "HashFunction,1\nf,1.5\n", 2, "1"),
        (functions, "HashFunction,1\nf,0\n", 0, ""),
        (functions, "HashFunction,1\nf,1000001\n", 0, ""),
        (lengths, "num_prefill_tokens\n", 1, "num_decode_tokens"),
        (lengths, "num_prefill_tokens,num_decode_tokens\n3,x\n", 2, "num_decode_tokens"),
        (lengths, "num_prefill_tokens,num_decode_tokens\n", 0, ""),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_file_line_and_column(
    write: Write, read: Callable[[Path], Iterable[object]], text: str, line: int, column: str
) -> None:
    path = write(text)
    with pytest.raises(InvalidTrace) as caught:
        list(read(path))
    assert (caught.value.path, caught.value.line, caught.value.column) == (str(path), line, column)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match="missing"):
        list(azure_llm(tmp_path / "missing"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InvalidTrace, match="UTF-8"):
        list(azure_llm(tmp_path / "binary"))


@pytest.mark.parametrize(
    "options", [{"first_minute": 0}, {"first_minute": 3}, {"minutes": 3}, {"minutes": 0}, {"rate_per_s": 0.0}]
)
def test_minutes_or_rates_that_cannot_be_are_refused(write: Write, options: dict[str, float]) -> None:
    with pytest.raises(InvalidWorkload):
        functions(write(table("", [1, 1])), **options)


def test_rows_before_a_broken_one_have_been_given(write: Write) -> None:
    read = azure_llm(write(LLM + "2023-11-16 18:00:00,5,5\nbroken\n"))
    assert next(read).prompt_tokens == 5
    with pytest.raises(InvalidTrace):
        next(read)
