from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stoker_contracts.codec import pack_tokens, unpack_tokens
from stoker_contracts.inference import (
    GATEWAY_LEASE_S,
    KEEPALIVE_S,
    RESEND_AFTER_S,
    TOKENS_AHEAD_MAX,
    Accepted,
    Ack,
    Cancel,
    Finish,
    Generate,
    Refused,
    RefusedReason,
    Sampling,
    Wanted,
)
from stoker_worker.engines.base import EngineOutput
from stoker_worker.instance.streams import Streams


def generate(request_id: str = "r1", attempt: int = 1, gateway: str = "g1", **fields: object) -> Generate:
    return Generate(
        request_id=request_id,
        attempt=attempt,
        gateway_id=gateway,
        prompt=pack_tokens([1, 2, 3]),
        sampling=Sampling(max_tokens=10),
        **fields,
    )


def streams(slots: int = 2) -> Streams:
    made = Streams(slots=slots, now_s=0.0)
    made.became_ready(0.0)
    return made


def ack(next_index: int, request_id: str = "r1", gateway: str = "g1") -> Ack:
    return Ack(gateway_id=gateway, wanted=(Wanted(request_id=request_id, attempt=1, next=next_index),))


def test_a_request_is_admitted_once_however_often_it_is_sent():
    s = streams()
    reply, request = s.generate(generate(), 0.0)
    assert reply == Accepted(room=1)
    assert request is not None
    assert list(request.prompt) == [1, 2, 3]
    again, nothing = s.generate(generate(), 0.1)
    assert isinstance(again, Accepted)
    assert nothing is None
    assert s.arrivals == 1


def test_a_finished_and_acked_request_is_not_admitted_again():
    s = streams()
    s.generate(generate(), 0.0)
    s.produced([EngineOutput("r1/1", (7,), Finish.STOP)], 0.1)
    s.ack(ack(2), 0.2)
    assert s.open == 0
    reply, request = s.generate(generate(), 0.3)
    assert isinstance(reply, Accepted)
    assert request is None


def test_no_more_requests_than_slots_are_admitted():
    s = streams(slots=1)
    s.generate(generate(), 0.0)
    reply, request = s.generate(generate("r2"), 0.0)
    assert isinstance(reply, Refused)
    assert reply.reason == RefusedReason.BUSY
    assert reply.retry_after_ms > 0
    assert request is None


def test_nothing_is_admitted_before_the_engine_is_ready_nor_while_stopping():
    s = Streams(slots=1, now_s=0.0)
    assert s.generate(generate(), 0.0)[1] is None
    s.became_ready(0.0)
    s.stopping = True
    reply, _ = s.generate(generate(), 0.0)
    assert isinstance(reply, Refused)
    assert reply.reason == RefusedReason.STOPPING


def test_a_request_with_generated_tokens_is_refused_while_engines_cannot_resume():
    reply, request = streams().generate(generate(generated=pack_tokens([5])), 0.0)
    assert isinstance(reply, Refused)
    assert reply.reason == RefusedReason.UNSUPPORTED
    assert request is None


def test_unacked_tokens_are_sent_again_from_the_first_one_missing():
    s = streams()
    s.generate(generate(), 0.0)
    s.produced([EngineOutput("r1/1", (10, 11))], 0.1)
    s.produced([EngineOutput("r1/1", (12,))], 0.2)
    s.ack(ack(1), 0.3)
    assert not [f for o in s.tick(0.4)[0] for f in o.frames]
    again = [f for o in s.tick(0.3 + RESEND_AFTER_S)[0] for f in o.frames]
    assert [(f.index, list(unpack_tokens(f.tokens))) for f in again] == [(1, [11, 12])]


def test_a_lost_frame_is_sent_again_while_the_stream_goes_on():
    s = streams()
    s.generate(generate(), 0.0)
    again = []
    for step in range(1, 101):  # a token every 20 ms; the gateway got none of the first two, so it acks nothing
        s.produced([EngineOutput("r1/1", (step,))], step * 0.02)
        s.ack(ack(0), step * 0.02)
        again += [f for o in s.tick(step * 0.02)[0] for f in o.frames]
    assert [f.index for f in again] == [0] * len(again)
    assert 2 <= len(again) <= 4, "after 500 ms each, not with every step"
    assert list(unpack_tokens(again[-1].tokens))[:2] == [1, 2]


def test_a_stream_that_is_acked_regularly_is_never_sent_again():
    s = streams()
    s.generate(generate(), 0.0)
    for step in range(1, 101):
        now_s = step * 0.02
        s.produced([EngineOutput("r1/1", (step,))], now_s)
        if step % 12 == 0:
            s.ack(ack(step - 1), now_s)
        assert not [f for o in s.tick(now_s)[0] for f in o.frames]


def test_a_finish_is_kept_until_it_is_acked_itself():
    s = streams()
    s.generate(generate(), 0.0)
    s.produced([EngineOutput("r1/1", (10,), Finish.LENGTH)], 0.1)
    s.ack(ack(1), 0.2)
    assert s.open == 1
    again = [f for o in s.tick(1.0)[0] for f in o.frames]
    assert [(f.index, f.tokens, f.finish) for f in again] == [(1, b"", Finish.LENGTH)]
    s.ack(ack(2), 1.1)
    assert s.open == 0


def test_a_gateway_that_stops_acking_loses_its_requests_and_no_other_does():
    s = streams()
    s.generate(generate("r1", gateway="g1"), 0.0)
    s.generate(generate("r2", gateway="g2"), 0.0)
    now_s = GATEWAY_LEASE_S + 0.1
    s.ack(ack(0, "r2", "g2"), now_s)
    _, abort = s.tick(now_s)
    assert abort == ["r1/1"]
    assert s.running == 1


def test_a_lease_runs_only_while_the_own_link_is_up():
    s = streams()
    s.generate(generate(), 0.0)
    assert s.tick(8.0, link_up_since_s=7.0)[1] == [], "the gateway could not be heard"
    assert s.tick(7.0 + GATEWAY_LEASE_S + 0.1, link_up_since_s=7.0)[1] == ["r1/1"]


def test_a_gateway_that_comes_back_after_its_lease_learns_that_its_request_is_gone():
    s = streams()
    s.generate(generate(), 0.0)
    s.produced([EngineOutput("r1/1", (10, 11))], 0.1)
    late_s = GATEWAY_LEASE_S + 0.1
    s.tick(late_s)
    s.generate(generate("r2"), late_s)  # keeps the keepalives coming
    (told,) = s.ack(ack(2), late_s)
    (frame,) = told.frames
    assert (told.gateway_id, frame.request_id, frame.attempt, frame.index) == ("g1", "r1", 1, 2)
    assert frame.finish == Finish.ERROR
    assert frame.error


def test_a_repeated_ack_of_a_finish_needs_no_answer():
    s = streams()
    s.generate(generate(), 0.0)
    s.produced([EngineOutput("r1/1", (10,), Finish.STOP)], 0.1)
    assert s.ack(ack(2), 0.2) == []
    assert s.ack(ack(2), 0.3) == []


def test_another_gateway_cannot_ack_for_the_owner():
    s = streams()
    s.generate(generate(), 0.0)
    s.produced([EngineOutput("r1/1", (10,), Finish.STOP)], 0.1)
    s.ack(ack(2, gateway="g2"), 0.2)
    assert s.open == 1


def test_cancel_frees_the_slot_and_later_outputs_are_dropped():
    s = streams(slots=1)
    s.generate(generate(), 0.0)
    assert s.cancel(Cancel(request_id="r1", attempt=1), 0.1) == ["r1/1"]
    assert s.produced([EngineOutput("r1/1", (9,))], 0.2) == ([], [])
    assert s.room == 1


def test_a_cancel_that_overtakes_its_request_keeps_it_out():
    s = streams()
    assert s.cancel(Cancel(request_id="r1", attempt=1), 0.0) == []
    assert s.generate(generate(), 0.1)[1] is None


def test_a_stream_too_far_ahead_of_its_acks_is_ended():
    s = streams()
    s.generate(generate(), 0.0)
    outgoing, abort = s.produced([EngineOutput("r1/1", tuple(range(TOKENS_AHEAD_MAX + 1)))], 0.1)
    assert abort == ["r1/1"]
    assert outgoing[0].frames[-1].finish == Finish.ERROR


def test_an_engines_error_of_any_length_fits_in_a_frame():
    s = streams()
    s.generate(generate(), 0.0)
    outgoing, _ = s.produced([EngineOutput("r1/1", (), Finish.ERROR, "x" * 1_000_000)], 0.1)
    assert len(outgoing[0].frames[0].error) < 10_000


def test_a_gateway_hears_a_keepalive_while_it_has_a_request_here():
    s = streams()
    s.generate(generate(), 0.0)
    outgoing, _ = s.tick(KEEPALIVE_S)
    assert [(o.gateway_id, o.frames) for o in outgoing] == [("g1", ())]
    assert s.tick(KEEPALIVE_S + 0.1)[0] == []


def test_idle_time_counts_from_the_last_ack_and_not_while_busy():
    s = streams()
    assert s.idle_ms(1.0) == 1000
    s.generate(generate(), 2.0)
    assert s.idle_ms(3.0) == 0
    s.produced([EngineOutput("r1/1", (1,), Finish.STOP)], 3.0)
    s.ack(ack(2), 4.0)
    assert s.idle_ms(4.5) == 500


@given(
    st.lists(st.tuples(st.sampled_from(["token", "lose", "tick", "ack"]), st.integers(1, 4)), max_size=60),
)
def test_a_receiver_gets_every_token_in_order_whatever_frames_are_lost(script: list[tuple[str, int]]) -> None:
    s = streams()
    s.generate(generate(), 0.0)
    made: list[int] = []
    got: list[int] = []
    finished = False
    now_s = 0.0

    def receive(outgoing, lost: bool) -> None:
        nonlocal finished
        for frame in (f for o in outgoing for f in o.frames if not lost):
            tokens = list(unpack_tokens(frame.tokens))
            if frame.index <= len(got):
                got.extend(tokens[len(got) - frame.index :])
                finished = finished or (frame.finish is not None and frame.index + len(tokens) == len(got))

    def step(kind: str, count: int, finish: Finish | None = None) -> None:
        nonlocal now_s
        now_s += 0.2
        if kind in ("token", "lose"):
            tokens = list(range(len(made), len(made) + count))
            made.extend(tokens)
            receive(s.produced([EngineOutput("r1/1", tokens, finish)], now_s)[0], kind == "lose")
        elif kind == "tick":
            receive(s.tick(now_s)[0], False)
        s.ack(ack(len(got) + finished), now_s)

    for kind, count in script:
        step(kind, count)
    step("lose", 1, Finish.STOP)
    for _ in range(6):
        step("tick", 0)
    assert got == made
    assert finished
    assert s.open == 0
