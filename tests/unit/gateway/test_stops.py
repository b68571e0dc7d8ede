from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stoker_gateway.text.stops import StopCutter


def run(stops: list[str], parts: list[str]) -> tuple[list[str], bool]:
    cutter = StopCutter(stops)
    shown = [cutter.push(part) for part in parts]
    return [*shown, cutter.flush()], cutter.stopped


def test_text_is_cut_where_a_stop_string_begins() -> None:
    assert run(["END"], ["one END two"]) == (["one ", ""], True)


def test_a_stop_string_across_pieces_is_found_and_never_shown() -> None:
    assert run(["###"], ["a#", "#", "#b"]) == (["a", "", "", ""], True)


def test_what_can_no_longer_become_a_stop_string_is_let_go_at_once() -> None:
    assert run(["abcd"], ["xab", "c", "x", "ab"]) == (["x", "", "abcx", "", "ab"], False)


def test_only_as_much_as_could_become_a_stop_string_is_held_back() -> None:
    assert run(["aab"], ["aaa"])[0] == ["a", "aa"]


def test_the_stop_string_that_is_complete_first_cuts() -> None:
    assert run(["world", "lo"], ["hello world"]) == (["hel", ""], True)


def test_pieces_do_not_decide_which_stop_string_cuts() -> None:
    assert run(["abb", "b"], ["abb"]) == (["a", ""], True)
    assert run(["abb", "b"], ["a", "b", "b"]) == (["", "a", "", ""], True)


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], False)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.lists(st.text("ab", max_size=6), max_size=12))
def test_pieces_show_the_text_up_to_the_stop_string_that_is_complete_first(stops: list[str], parts: list[str]) -> None:
    text = "".join(parts)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    shown, stopped = run(stops, parts)
    assert stopped == bool(ends)
    assert "".join(shown) == (text[: min(ends)[1]] if ends else text)
