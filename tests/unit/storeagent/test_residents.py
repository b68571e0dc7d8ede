import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import PoolExhausted
from stoker_storeagent import residents
from stoker_storeagent.residents import WINDOW_CHUNKS_MAX, WINDOW_EVICTS_TO, Resident, Residents

NOW_S = 10_000.0


def a_pool(chunks: int, *idle: tuple[str, int, float]) -> Residents:
    """With models that were read and given back: (name, chunks, when)."""
    made = Residents(chunks, lambda model_id, size_bytes: float(size_bytes))
    for model_id, size, used_s in idle:
        resident = made.add(model_id, size, used_s, whole=True)
        resident.complete, resident.busy = True, False
    return made


def resident_of(made: Residents, model_id: str) -> Resident:
    found = made.find(model_id)
    assert found is not None
    return found


def make_room(made: Residents, chunks: int, *, starting: bool = True) -> list[str]:
    victims = made.evict(made.fit(chunks, starting=starting), NOW_S, starting=starting)
    for victim in victims:
        made.free(victim)
    return sorted(victim.model_id for victim in victims)


def names(made: Residents) -> set[str]:
    return {resident.model_id for resident in made}


def test_room_is_made_from_what_was_unused_for_longest() -> None:
    made = a_pool(10, ("new", 4, 9000.0), ("old", 3, 1000.0), ("middle", 3, 5000.0))
    assert make_room(made, 5) == ["middle", "old"]
    assert made.chunks_free == 6


def test_what_is_dear_to_have_again_stays() -> None:
    costs = {"dear": 100.0, "cheap": 1.0}
    made = Residents(2, lambda model_id, size_bytes: costs[model_id])
    for model_id, used_s in (("dear", 0.0), ("cheap", 9000.0)):
        resident = made.add(model_id, 1, used_s, whole=True)
        resident.complete, resident.busy = True, False
    assert make_room(made, 1) == ["cheap"]


def test_a_lease_and_its_end_both_count_as_use() -> None:
    made = a_pool(4, ("a", 2, 1000.0), ("b", 2, 2000.0))
    made.hold(resident_of(made, "a"), "i", 3000.0)
    made.release(resident_of(made, "a"), "i", 4000.0)
    assert make_room(made, 2) == ["b"]


def test_who_takes_what_is_there_holds_it_but_does_not_count_as_use() -> None:
    made = a_pool(4, ("a", 2, 1000.0), ("b", 2, 2000.0))
    made.share(resident_of(made, "a"), "peer")
    assert make_room(made, 2) == ["b"]
    made.unshare(resident_of(made, "a"), "peer")
    assert resident_of(made, "a").used_s == 1000.0
    assert make_room(made, 4) == ["a"]


def test_nothing_is_evicted_while_there_is_room() -> None:
    assert make_room(a_pool(10, ("old", 3, 1.0)), 7) == []


def test_chunks_of_an_evicted_model_are_taken_until_they_are_freed() -> None:
    made = a_pool(4, ("a", 3, 1.0))
    [victim] = made.evict(made.fit(2), NOW_S)
    assert names(made) == set()
    assert made.chunks_free == 1
    with pytest.raises(PoolExhausted):
        made.fit(2)
    made.free(victim)
    assert made.chunks_free == 4


def test_what_is_held_is_being_read_or_copied_or_is_not_complete_is_never_evicted() -> None:
    made = a_pool(12, ("held", 4, 1.0), ("copied", 3, 1.0))
    made.hold(resident_of(made, "held"), "i", 2.0)
    resident_of(made, "copied").busy = True
    made.add("reading", 3, 3.0, whole=True)
    with pytest.raises(PoolExhausted) as caught:
        made.fit(3)
    assert (caught.value.need_bytes, caught.value.free_bytes) == (3 * CHUNK_BYTES, 2 * CHUNK_BYTES)
    assert made.evict(2, NOW_S) == []
    assert names(made) == {"held", "copied", "reading"}


def test_a_start_takes_the_room_of_what_only_a_prefetch_wanted_and_another_prefetch_does_not() -> None:
    made = a_pool(8)
    made.add("ahead", 6, 1.0, whole=True, yielding=True)
    with pytest.raises(PoolExhausted):
        made.fit(4, starting=False)
    assert make_room(made, 4) == ["ahead"]


def test_what_was_asked_for_once_gives_way_no_more_while_it_is_read() -> None:
    made = a_pool(8)
    ahead = made.add("ahead", 6, 1.0, whole=True, yielding=True)
    made.hold(ahead, "i", 2.0)
    made.release(ahead, "i", 3.0)
    with pytest.raises(PoolExhausted):
        made.fit(3)


def test_a_model_that_does_not_fit_gets_a_window_of_what_can_be_had() -> None:
    made = a_pool(10, ("idle", 3, 1.0), ("leased", 3, 2.0))
    made.hold(resident_of(made, "leased"), "i", 3.0)
    assert [made.fit(11), made.fit(8), made.fit(7)] == [7, 7, 7]


def test_a_prefetch_gets_no_window() -> None:
    with pytest.raises(PoolExhausted):
        a_pool(10).fit(11, starting=False)


def test_a_window_evicts_no_more_than_keeps_a_disk_busy() -> None:
    assert a_pool(100, ("idle", 90, 1.0)).fit(101) == WINDOW_EVICTS_TO
    assert a_pool(100).fit(101) == WINDOW_CHUNKS_MAX


def test_without_room_for_a_window_the_pool_is_exhausted() -> None:
    made = a_pool(10)
    made.add("leased", 7, 1.0, whole=True)
    with pytest.raises(PoolExhausted):
        made.fit(11)


def test_a_pool_smaller_than_a_window_streams_all_the_same() -> None:
    assert a_pool(2).fit(3) == 2


def test_a_window_belongs_to_one_lease() -> None:
    made = a_pool(10)
    window = made.add("large", 10, 1.0, whole=False)
    made.hold(window, "i", 1.0)
    assert made.find("large") is None
    assert not made.unwanted(window)
    made.release(window, "i", 2.0)
    assert made.unwanted(window)
    made.free(window)
    assert made.chunks_free == 10


def test_a_failed_load_keeps_its_chunks_until_the_last_lease_ends_and_nobody_joins_it() -> None:
    made = a_pool(10)
    failed = made.add("m", 4, 1.0, whole=True)
    for holder in ("i", "j"):
        made.hold(failed, holder, 1.0)
    made.drop(failed)
    assert made.find("m") is None
    again = made.add("m", 4, 2.0, whole=True)
    made.release(failed, "i", 3.0)
    assert not made.unwanted(failed)
    made.release(failed, "j", 4.0)
    assert made.unwanted(failed)
    made.free(failed)
    assert made.find("m") is again
    assert made.chunks_free == 6


def test_a_model_without_leases_stays() -> None:
    made = a_pool(10, ("a", 4, 1.0))
    assert not made.unwanted(resident_of(made, "a"))


def test_only_who_holds_it_gives_it_back() -> None:
    made = a_pool(10, ("a", 4, 1.0))
    made.hold(resident_of(made, "a"), "i", 1.0)
    with pytest.raises(AssertionError):
        made.release(resident_of(made, "a"), "j", 2.0)
    with pytest.raises(AssertionError):
        made.free(resident_of(made, "a"))


def test_the_number_of_models_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "RESIDENTS_MAX", 2)
    assert make_room(a_pool(10, ("a", 1, 9000.0), ("b", 1, 1000.0)), 1) == ["b"]


class Using(RuleBasedStateMachine):
    """Models come, are held, given back, completed, dropped and make way for one another."""

    @initialize(chunks=st.integers(1, 40))
    def begin(self, chunks: int) -> None:
        self.made, self.now_s = a_pool(chunks), 0.0
        self.held: list[tuple[Resident, str]] = []

    @rule(
        model_id=st.sampled_from("abcdef"), chunks=st.integers(1, 50), starting=st.booleans(), idle_s=st.integers(0, 90)
    )
    def ask(self, model_id: str, chunks: int, starting: bool, idle_s: int) -> None:
        self.now_s += idle_s
        resident = self.made.find(model_id)
        if resident is None:
            try:
                given = self.made.fit(chunks, starting=starting)
            except PoolExhausted:
                idle = [r for r in self.made if not r.leases]
                may_go = [r for r in idle if (r.complete and not r.busy) or (starting and r.yielding)]
                assert chunks > self.made.chunks_free + sum(r.chunks for r in may_go), "all of it could be had"
                return
            assert given == chunks or starting
            victims = self.made.evict(given, self.now_s, starting=starting)
            for victim in victims:
                assert victim not in [resident for resident, _ in self.held]
                assert not victim.leases
                assert (victim.complete and not victim.busy) or (starting and victim.yielding)
                self.made.free(victim)
            resident = self.made.add(model_id, given, self.now_s, whole=given == chunks, yielding=not starting)
        if starting:
            self.made.hold(resident, "i", self.now_s)
            self.held.append((resident, "i"))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        resident, holder = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.made.release(resident, holder, self.now_s)
        if self.made.unwanted(resident):
            self.made.free(resident)

    @rule(data=st.data(), complete=st.booleans())
    def end(self, data: st.DataObject, complete: bool) -> None:
        busy = sorted((r for r in self.made.all if r.busy), key=lambda r: (r.model_id, r.used_s, r.chunks))
        if busy:
            resident = data.draw(st.sampled_from(busy))
            resident.busy, resident.complete = False, complete
            if not complete:
                self.made.drop(resident)
            if self.made.unwanted(resident):
                self.made.free(resident)

    @invariant()
    def no_chunk_is_taken_twice(self) -> None:
        assert 0 <= self.made.chunks_free <= self.made.chunks_total
        assert sum(r.chunks for r in self.made.all) + self.made.chunks_free == self.made.chunks_total

    @invariant()
    def what_is_held_is_here(self) -> None:
        assert {resident for resident, _ in self.held} <= self.made.all
        assert sum(r.leases for r in self.made.all) == len(self.held)

    @invariant()
    def whom_one_can_join_is_not_dropped(self) -> None:
        assert all(r.whole and not r.dropped and r in self.made.all for r in self.made)


TestUsing = Using.TestCase
TestUsing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
