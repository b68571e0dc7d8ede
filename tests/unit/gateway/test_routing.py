"""Routes from worker status, queues, the dispatcher between them, and demand. Nothing here waits."""

from __future__ import annotations

import pytest
from tests.support.fake_instance import model_spec

from stoker_contracts.control import InstanceStatus, WorkerStatus
from stoker_contracts.models import InstanceState
from stoker_core.errors import ModelNotFound, Overloaded
from stoker_gateway.demand import DemandBook
from stoker_gateway.newest import Newest
from stoker_gateway.queues import Dispatcher, Queues, Ticket
from stoker_gateway.routes import Route, Routes

SPEC = model_spec(slots=2, queue_max=3)
READY, STARTING, STOPPING, FAILED = (
    InstanceState.READY,
    InstanceState.STARTING,
    InstanceState.STOPPING,
    InstanceState.FAILED,
)


def instance(
    instance_id: str, state: InstanceState = READY, *, room: int = 2, failure: str = "", model_id: str = SPEC.model_id
) -> InstanceStatus:
    return InstanceStatus(
        instance_id=instance_id,
        model_id=model_id,
        model=SPEC.name,
        state=state,
        devices=(0,),
        room=room,
        failure=failure,
    )


def status(
    seq: int, *instances: InstanceStatus, node: str = "a", boot: str = "b1", draining: bool = False
) -> WorkerStatus:
    return WorkerStatus(node=node, boot_id=boot, seq=seq, term=1, devices=(), instances=instances, draining=draining)


def reserve(routes: Routes) -> str | None:
    route = routes.reserve(SPEC.model_id, slots=SPEC.slots)
    return route.instance_id if route else None


def must_reserve(routes: Routes) -> Route:
    route = routes.reserve(SPEC.model_id, slots=SPEC.slots)
    assert route is not None
    return route


# Newest


def test_an_older_message_of_the_same_boot_is_no_news() -> None:
    newest: Newest[WorkerStatus] = Newest()
    assert newest.offer(status(2), 0)
    assert not newest.offer(status(2), 1)
    assert not newest.offer(status(1), 1)
    assert newest.offer(status(3), 1)


def test_a_new_boot_replaces_the_old_for_good_even_with_a_lower_sequence() -> None:
    newest: Newest[WorkerStatus] = Newest()
    newest.offer(status(9, boot="b1"), 0)
    assert newest.offer(status(1, boot="b2"), 1)
    assert not newest.offer(status(10, boot="b1"), 2)
    kept = newest.get("a")
    assert kept is not None
    assert kept.boot_id == "b2"


def test_silence_counts_only_while_the_own_link_was_up() -> None:
    newest: Newest[WorkerStatus] = Newest()
    newest.offer(status(1), 0)
    assert newest.drop_silent(10, limit_s=3, link_up_since_s=8) == []
    assert newest.drop_silent(11.5, limit_s=3, link_up_since_s=8) == ["a"]
    assert newest.all() == []


# Routes


def test_only_ready_instances_of_the_model_are_chosen() -> None:
    routes = Routes()
    routes.on_status(
        status(1, instance("x", STARTING), instance("y", STOPPING), instance("z", model_id="other"), instance("r")), 0
    )
    assert reserve(routes) == "r"


def test_fewest_own_requests_first_ties_by_id() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("j2"), instance("j1")), 0)
    assert [reserve(routes) for _ in range(5)] == ["j1", "j2", "j1", "j2", None]


def test_a_burst_does_not_overrun_the_room_that_was_told() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i", room=1)), 0)
    assert [reserve(routes), reserve(routes)] == ["i", None]


def test_a_stale_status_does_not_promise_more_than_the_slots() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i")), 0)
    first, second = must_reserve(routes), must_reserve(routes)
    routes.accepted(first, room=1)
    routes.accepted(second, room=0)
    routes.on_status(status(2, instance("i", room=2)), 1)  # told before the two were admitted
    assert reserve(routes) is None
    routes.release("i")
    assert reserve(routes) == "i"


def test_a_refusal_ends_offers_until_the_instance_says_it_has_room() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i")), 0)
    routes.refused(must_reserve(routes))
    assert reserve(routes) is None
    assert routes.on_room("i", 1) == SPEC.model_id
    assert reserve(routes) == "i"


def test_a_busy_instance_is_asked_again_when_it_said_to() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i")), 0)
    routes.refused(must_reserve(routes), retry_s=5.0)
    routes.reopen(4.9)
    assert reserve(routes) is None
    routes.reopen(5.0)
    assert [reserve(routes), reserve(routes)] == ["i", None]


def test_a_short_answer_that_overtakes_its_admission_leaves_room_behind() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i", room=1)), 0)
    route = must_reserve(routes)
    routes.on_room("i", 1)  # said with the finish
    routes.accepted(route, room=0)  # said before it, heard after it
    routes.release("i")
    assert reserve(routes) == "i"


def test_an_instance_that_is_stopping_is_not_asked_again() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i")), 0)
    routes.refused(must_reserve(routes), stopping=True)
    assert routes.on_room("i", 2) is None
    assert reserve(routes) is None


def test_a_withdrawn_request_gives_its_room_back() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i", room=1)), 0)
    routes.withdrawn(must_reserve(routes))
    assert reserve(routes) == "i"


def test_what_is_gone_failed_or_of_an_earlier_boot_is_lost() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("gone"), instance("crashed"), instance("fine")), 0)
    change = routes.on_status(status(2, instance("crashed", FAILED, failure="SIGKILL"), instance("fine")), 1)
    assert set(change.lost) == {"gone", "crashed"}
    assert change.lost["crashed"] == "SIGKILL"
    change = routes.on_status(status(1, instance("new"), boot="b2"), 2)
    assert set(change.lost) == {"fine"}
    assert reserve(routes) == "new"


def test_a_stopping_instance_keeps_its_streams() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i")), 0)
    assert routes.on_status(status(2, instance("i", STOPPING)), 1).lost == {}


def test_the_last_failure_is_kept_until_an_instance_is_ready() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i", FAILED, failure="no memory")), 0)
    assert routes.failures == {SPEC.model_id: "no memory"}
    routes.on_status(status(2, instance("i", FAILED, failure="no memory"), instance("j")), 1)
    assert routes.failures == {}


def test_a_silent_node_gets_no_requests_until_it_is_heard_again() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i")), 0)
    must_reserve(routes)
    assert routes.drop_silent(4, link_up_since_s=0) == ["a"]
    assert reserve(routes) is None
    routes.on_status(status(2, instance("i", room=1)), 5)
    assert reserve(routes) == "i"
    assert reserve(routes) is None  # the first one is still counted


def test_a_draining_node_gets_no_more_requests_until_it_is_used_again() -> None:
    routes = Routes()
    routes.on_status(status(1, instance("i1")), 0)
    taken = must_reserve(routes)
    routes.on_status(status(2, instance("i1", room=1), draining=True), 0)
    assert routes.ready(SPEC.model_id) == []
    assert reserve(routes) is None
    routes.accepted(taken, 1)
    routes.release("i1")  # what is in hand there ends as ever
    change = routes.on_status(status(3, instance("i1")), 0)
    assert SPEC.model_id in change.models
    assert reserve(routes) == "i1"


# Queues and the dispatcher


def made() -> tuple[Dispatcher, Routes, Queues]:
    routes, queues = Routes(), Queues()
    return Dispatcher(queues, routes), routes, queues


def granted(ticket: Ticket) -> str | None:
    return ticket.granted.result().instance_id if ticket.granted.done() else None


async def test_first_come_first_served_as_room_appears() -> None:
    dispatcher, routes, queues = made()
    tickets = [queues.join(SPEC, 0) for _ in range(3)]
    routes.on_status(status(1, instance("i", room=1)), 0)
    dispatcher.wake(SPEC.model_id)
    assert [granted(t) for t in tickets] == ["i", None, None]
    routes.accepted(tickets[0].granted.result(), room=1)
    dispatcher.wake(SPEC.model_id)
    assert [granted(t) for t in tickets] == ["i", "i", None]


async def test_a_full_queue_says_when_to_come_again() -> None:
    _, _, queues = made()
    for _ in range(SPEC.queue_max):
        queues.join(SPEC, 0)
    with pytest.raises(Overloaded) as caught:
        queues.join(SPEC, 0)
    assert caught.value.retry_after_ms > 0
    queues.join(model_spec("other"), 0)


async def test_a_refused_request_goes_back_before_all_that_came_later() -> None:
    dispatcher, routes, queues = made()
    first, second, third = [queues.join(SPEC, 0) for _ in range(3)]
    routes.on_status(status(1, instance("i")), 0)
    dispatcher.wake(SPEC.model_id)
    for ticket in (second, first):
        routes.refused(ticket.granted.result())
        queues.rejoin(ticket)
    routes.on_room("i", 1)
    dispatcher.wake(SPEC.model_id)
    assert granted(first) == "i"
    assert not second.granted.done()
    assert not third.granted.done()


async def test_a_request_cancelled_this_moment_is_passed_over() -> None:
    dispatcher, routes, queues = made()
    first, second = queues.join(SPEC, 0), queues.join(SPEC, 0)
    first.granted.cancel()
    routes.on_status(status(1, instance("i", room=1)), 0)
    dispatcher.wake(SPEC.model_id)
    assert granted(second) == "i"


async def test_a_deleted_models_requests_end_at_once() -> None:
    _, _, queues = made()
    ticket = queues.join(SPEC, 0)
    queues.refuse_all(SPEC.model_id, ModelNotFound(SPEC.name))
    with pytest.raises(ModelNotFound):
        await ticket.granted
    assert queues.models() == []


# Demand


def book(queues: Queues) -> DemandBook:
    return DemandBook("gw", queues, lambda: 0.5)


async def test_demand_is_told_at_once_then_every_half_second_and_once_when_it_ends() -> None:
    queues = Queues()
    one = book(queues)
    assert one.due(0) == []
    assert one.next_s(0) is None
    ticket = queues.join(SPEC, 10.0)
    (told,) = one.due(10.0)
    assert (told.model_id, told.queued, told.oldest_wait_ms) == (SPEC.model_id, 1, 0)
    assert one.due(10.4) == []
    assert one.next_s(10.4) == pytest.approx(10.5)
    (told,) = one.due(10.5)
    assert (told.queued, told.oldest_wait_ms) == (1, 500)
    queues.leave(ticket)
    (told,) = one.due(10.6)
    assert (told.queued, told.oldest_wait_ms) == (0, 0)
    assert one.due(11.0) == []
    assert one.next_s(11.0) is None


async def test_a_queue_that_comes_and_goes_does_not_flood_the_leader() -> None:
    queues = Queues()
    one = book(queues)
    sent = 0
    for i in range(1000):
        ticket = queues.join(SPEC, i / 1000)
        sent += len(one.due(i / 1000))
        queues.leave(ticket)
        sent += len(one.due(i / 1000))
    assert 20 <= sent <= 50


async def test_the_dispatcher_reports_change_only_where_somebody_waits() -> None:
    dispatcher, routes, queues = made()
    routes.on_status(status(1, instance("i")), 0)
    dispatcher.wake(SPEC.model_id)
    assert not dispatcher.changed.is_set()
    queues.join(SPEC, 0)
    dispatcher.wake(SPEC.model_id)
    assert dispatcher.changed.is_set()
