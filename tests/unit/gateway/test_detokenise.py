from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import END_ID, FIRST_BYTE_ID, build_tokenizer

from stoker_gateway.text.detokenise import Detokeniser

TOKENIZER = build_tokenizer()


def decode(ids: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(ids), skip_special_tokens=True)
    return text


def stripping(ids: Sequence[int]) -> str:
    """Like SentencePiece: words carry a leading space, and a decoding loses the first one."""
    return "".join(f" w{i}" for i in ids).removeprefix(" ")


def pieces(ids: Sequence[int], sizes: Sequence[int], with_decode: Callable[[Sequence[int]], str]) -> list[str]:
    detokeniser = Detokeniser(with_decode)
    shown, at = [], 0
    for size in sizes:
        shown.append(detokeniser.push(ids[at : at + size]))
        at += size
    return [*shown, detokeniser.push(ids[at:]), detokeniser.flush()]


sizes = st.lists(st.integers(0, 5), max_size=300)


@given(st.text(max_size=200), sizes)
def test_pieces_of_any_text_add_up_to_the_text(text: str, cuts: list[int]) -> None:
    ids = TOKENIZER.encode(text).ids
    assert "".join(pieces(ids, cuts, decode)) == decode(ids) == text


@given(st.lists(st.integers(0, 511), max_size=300), sizes)
def test_pieces_of_any_tokens_add_up_to_the_full_decoding(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(ids, cuts, decode)) == decode(ids)


@given(st.lists(st.integers(FIRST_BYTE_ID, FIRST_BYTE_ID + 255), min_size=200, max_size=300), sizes)
def test_pieces_of_any_bytes_add_up_to_the_full_decoding(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(ids, cuts, decode)) == decode(ids)


@given(st.lists(st.integers(0, 99), max_size=50), sizes)
def test_a_decoder_that_strips_a_leading_space_strips_only_the_first(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(ids, cuts, stripping)) == stripping(ids)


@given(st.text(st.characters(blacklist_characters="\ufffd", blacklist_categories=["Cs"]), max_size=80))
def test_no_piece_holds_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert not any("\ufffd" in piece for piece in pieces(ids, [1] * len(ids), decode))


def test_a_character_comes_with_its_last_byte() -> None:
    detokeniser = Detokeniser(decode)
    party = TOKENIZER.encode("🎉").ids
    assert [detokeniser.push([i]) for i in party] == ["", "", "", "🎉"]
    assert detokeniser.flush() == ""


def test_bytes_that_never_become_a_character_come_out_at_the_end_as_a_replacement() -> None:
    detokeniser = Detokeniser(decode)
    assert detokeniser.push(TOKENIZER.encode("a🎉").ids[:3]) == "a"
    assert detokeniser.flush() == "\ufffd"
    assert detokeniser.flush() == ""


def test_special_tokens_are_no_text() -> None:
    assert pieces([END_ID, *TOKENIZER.encode("hi").ids, END_ID], [1, 1, 1], decode)[-1] == ""
    assert "".join(pieces([END_ID, *TOKENIZER.encode("hi").ids, END_ID], [1, 1, 1], decode)) == "hi"


@pytest.mark.parametrize("token", [END_ID, TOKENIZER.encode("é").ids[1]])
def test_a_run_without_a_whole_character_decodes_few_tokens_again(token: int) -> None:
    longest = 0

    def watched(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    ids = [token] * 5000
    assert "".join(pieces(ids, [1] * len(ids), watched)) == decode(ids)
    assert longest <= 80
