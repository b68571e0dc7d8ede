from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import END_ID, build_tokenizer

from stoker_contracts.inference import Finish
from stoker_gateway.text.compose import Composer

TOKENIZER = build_tokenizer()
NEWLINE = TOKENIZER.encode("\n").ids[0]


def decode(ids: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(ids), skip_special_tokens=True)
    return text


def composer(*stops: str, end_ids: tuple[int, ...] = (END_ID,)) -> Composer:
    return Composer(decode, stops=stops, end_ids=end_ids)


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def test_the_end_token_is_counted_and_not_shown_even_if_it_is_plain_text() -> None:
    one = composer(end_ids=(NEWLINE,))
    assert one.push([*ids("a"), NEWLINE], Finish.STOP) == "a"
    assert (one.finish_reason, one.completion_tokens) == ("stop", 2)


def test_an_end_token_that_comes_before_its_finish_is_not_shown_either() -> None:
    one = composer(end_ids=(NEWLINE,))
    assert one.push([*ids("a"), NEWLINE], None) == "a"
    assert one.push([], Finish.STOP) == ""
    assert one.completion_tokens == 2


def test_an_end_token_that_does_not_end_the_answer_is_shown() -> None:
    one = composer(end_ids=(NEWLINE,))
    assert one.push([NEWLINE], None) == ""
    assert one.push(ids("b"), None) == "\nb"
    assert one.push([NEWLINE], Finish.LENGTH) == "\n"
    assert (one.finish_reason, one.completion_tokens) == ("length", 3)


def test_a_stop_string_ends_with_the_token_that_completes_it() -> None:
    one = composer("xy")
    assert one.push(ids("a") + ids("x") + ids("y") + ids("z") * 5, Finish.LENGTH) == "a"
    assert (one.finish_reason, one.completion_tokens) == ("stop", 3)


def test_what_was_held_back_comes_with_the_finish() -> None:
    one = composer("xyz")
    assert one.push(ids("ax"), None) == "a"
    assert one.push(ids("y"), Finish.LENGTH) == "xy"
    assert one.finish_reason == "length"


def test_an_unfinished_character_comes_as_a_replacement_with_the_finish() -> None:
    one = composer()
    assert one.push(ids("a🎉")[:3], Finish.LENGTH) == "a\ufffd"


@pytest.mark.parametrize("finish", [Finish.STOP, Finish.LENGTH])
def test_an_empty_answer_ends_too(finish: Finish) -> None:
    one = composer("x")
    assert one.push([], finish) == ""
    assert one.finish_reason == str(finish)


@given(st.text(max_size=60), st.lists(st.integers(0, 6), max_size=40), st.sampled_from([(), ("e",), ("the", "\n")]))
def test_pieces_show_what_the_whole_shows(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
    tokens = [*ids(text), END_ID]
    whole, pieced = composer(*stops), composer(*stops)
    expected = whole.push(tokens, Finish.STOP)
    shown, at = [], 0
    for size in cuts:
        if pieced.finish_reason is None:
            shown.append(pieced.push(tokens[at : at + size], None))
            at += size
    if pieced.finish_reason is None:
        shown.append(pieced.push(tokens[at:], Finish.STOP))
    assert "".join(shown) == expected
    assert pieced.completion_tokens == whole.completion_tokens
    assert pieced.finish_reason == whole.finish_reason == "stop"
