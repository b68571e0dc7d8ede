"""A session, as a dialogue with instances."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker_contracts.codec import pack_tokens, unpack_tokens
from stoker_contracts.inference import Finish, Frame
from stoker_core.errors import ClientTooSlow, EngineFailed, InstanceLost
from stoker_gateway.session import Session, Verdict

ACCEPTED, REPEAT, GAP, STRANGER = Verdict.ACCEPTED, Verdict.REPEAT, Verdict.GAP, Verdict.STRANGER


def session(tokens_max: int = 100, buffer_max: int = 100) -> Session:
    one = Session("r", tokens_max=tokens_max, buffer_max=buffer_max)
    one.begin("n", "i")
    return one


def frame(index: int, *tokens: int, finish: Finish | None = None, attempt: int = 1, error: str = "") -> Frame:
    return Frame(request_id="r", attempt=attempt, index=index, tokens=pack_tokens(tokens), finish=finish, error=error)


def test_frames_in_order_are_journalled_and_taken_once() -> None:
    one = session()
    assert one.on_frame("n", "i", frame(0, 10, 11)) is ACCEPTED
    assert list(one.take()) == [10, 11]
    assert one.on_frame("n", "i", frame(2, 12)) is ACCEPTED
    assert list(one.take()) == [12]
    assert list(one.take()) == []
    assert list(one.journal) == [10, 11, 12]


def test_a_repeat_changes_nothing() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10, 11))
    assert one.on_frame("n", "i", frame(0, 10, 11)) is REPEAT
    assert one.on_frame("n", "i", frame(1, 11)) is REPEAT
    assert one.on_frame("n", "i", frame(0, 10)) is REPEAT
    assert list(one.journal) == [10, 11]


def test_after_a_gap_the_ack_asks_for_the_missing_token() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10))
    assert one.on_frame("n", "i", frame(2, 12)) is GAP
    assert one.wanted.next == 1
    assert one.on_frame("n", "i", frame(1, 11, 12)) is ACCEPTED
    assert list(one.journal) == [10, 11, 12]


def test_of_an_overlapping_frame_the_new_part_is_taken() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10, 11))
    assert one.on_frame("n", "i", frame(1, 11, 12, finish=Finish.LENGTH)) is ACCEPTED
    assert list(one.journal) == [10, 11, 12]
    assert one.finish is Finish.LENGTH


def test_a_finish_is_acked_with_one_more() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10))
    assert one.wanted.next == 1
    assert one.on_frame("n", "i", frame(1, finish=Finish.STOP)) is ACCEPTED
    assert one.wanted.next == 2
    assert one.ended
    assert one.on_frame("n", "i", frame(1, finish=Finish.STOP)) is REPEAT
    assert one.on_frame("n", "i", frame(0, 10, finish=Finish.STOP)) is REPEAT


@pytest.mark.parametrize(("node", "instance", "attempt"), [("m", "i", 1), ("n", "j", 1), ("n", "i", 2)])
def test_anything_from_another_attempt_or_instance_is_a_stranger(node: str, instance: str, attempt: int) -> None:
    one = session()
    assert one.on_frame(node, instance, frame(0, 10, attempt=attempt)) is STRANGER
    assert not one.journal


def test_the_next_attempt_goes_on_where_the_journal_ends_and_the_old_one_counts_no_more() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10, 11))
    assert one.begin("m", "j") == 2
    assert list(unpack_tokens(one.generated)) == [10, 11]
    assert one.on_frame("n", "i", frame(2, 99)) is STRANGER
    assert one.on_frame("m", "j", frame(2, 12, attempt=2)) is ACCEPTED
    assert list(one.journal) == [10, 11, 12]


def test_an_error_frame_keeps_its_tokens_and_fails_with_its_reason() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10, finish=Finish.ERROR, error="no blocks"))
    assert list(one.take()) == [10]
    assert isinstance(one.failure, EngineFailed)
    assert "no blocks" in one.failure.message


def test_the_first_end_counts() -> None:
    one = session()
    one.on_frame("n", "i", frame(0, 10, finish=Finish.STOP))
    one.fail(InstanceLost())
    assert one.failure is None
    two = session()
    two.fail(InstanceLost())
    assert two.on_frame("n", "i", frame(0, 10, finish=Finish.STOP)) is STRANGER
    assert two.finish is None


def test_more_tokens_than_asked_for_fail_the_request() -> None:
    one = session(tokens_max=2)
    one.on_frame("n", "i", frame(0, 10, 11, 12))
    assert isinstance(one.failure, EngineFailed)


def test_a_reader_that_does_not_keep_up_is_cut_off_at_the_bound() -> None:
    one = session(buffer_max=2)
    one.on_frame("n", "i", frame(0, 10, 11))
    assert list(one.take()) == [10, 11]
    one.on_frame("n", "i", frame(2, 12, 13))
    assert one.failure is None
    one.on_frame("n", "i", frame(4, 14))
    assert isinstance(one.failure, ClientTooSlow)
    assert list(one.take()) == [12, 13]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20)), max_size=60))
def test_whatever_is_lost_repeated_and_reordered_each_token_comes_once_and_in_order(
    sent: list[tuple[int, int]],
) -> None:
    answer = list(range(100, 120))
    one = session()
    taken: list[int] = []
    for start, size in sent:
        end = min(start + size, 20)
        one.on_frame("n", "i", frame(start, *answer[start:end], finish=Finish.STOP if end == 20 else None))
        taken += one.take()
        assert taken == answer[: len(taken)]
        assert one.wanted.next == len(taken) + one.ended
    one.on_frame("n", "i", frame(len(one.journal), *answer[len(one.journal) :], finish=Finish.STOP))
    assert taken + list(one.take()) == answer
    assert one.finish is Finish.STOP


def test_frames_of_an_attempt_that_was_given_up_count_no_more() -> None:
    one = session()
    one.abandon()
    assert one.on_frame("n", "i", frame(0, 10, finish=Finish.STOP)) is STRANGER
    assert not one.ended
    assert one.begin("n", "i") == 2
    assert one.generated == b""
    assert one.on_frame("n", "i", frame(0, 10)) is STRANGER
    assert one.on_frame("n", "i", frame(0, 10, attempt=2)) is ACCEPTED
