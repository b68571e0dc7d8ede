import pytest

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import PoolExhausted
from stoker_storeagent import residents
from stoker_storeagent.residents import WINDOW_CHUNKS_MAX, WINDOW_EVICTS_TO, Resident, Residents


def pool(chunks: int, *idle: tuple[str, int, float]) -> Residents:
    """With models that were read and given back: (name, chunks, when)."""
    made = Residents(chunks)
    for model_id, size, used_s in idle:
        resident = made.add(model_id, size, used_s, whole=True)
        resident.complete = True
        made.release(resident, used_s)
    return made


def make_room(made: Residents, chunks: int) -> list[str]:
    victims = made.evict(made.fit(chunks))
    for victim in victims:
        made.free(victim)
    return [victim.model_id for victim in victims]


def names(made: Residents) -> set[str]:
    return {resident.model_id for resident in made}


def test_room_is_made_from_the_least_recently_used() -> None:
    made = pool(10, ("new", 4, 3.0), ("old", 3, 1.0), ("middle", 3, 2.0))
    assert make_room(made, 5) == ["old", "middle"]
    assert made.chunks_free == 6


def test_a_lease_and_its_end_both_count_as_use() -> None:
    made = pool(4, ("a", 2, 1.0), ("b", 2, 2.0))
    [a] = [resident for resident in made if resident.model_id == "a"]
    made.lease(a, 3.0)
    made.release(a, 4.0)
    assert make_room(made, 2) == ["b"]


def test_nothing_is_evicted_while_there_is_room() -> None:
    assert make_room(pool(10, ("old", 3, 1.0)), 7) == []


def test_chunks_of_an_evicted_model_are_taken_until_they_are_freed() -> None:
    made = pool(4, ("a", 3, 1.0))
    [victim] = made.evict(made.fit(2))
    assert names(made) == set()
    assert made.chunks_free == 1
    with pytest.raises(PoolExhausted):
        made.fit(2)
    made.free(victim)
    assert made.chunks_free == 4


def test_leased_models_and_those_being_read_are_never_evicted() -> None:
    made = pool(10, ("leased", 4, 1.0))
    made.lease(next(iter(made)), 2.0)
    reading = made.add("reading", 4, 3.0, whole=True)
    made.release(reading, 3.0)  # its client was killed
    with pytest.raises(PoolExhausted) as caught:
        made.fit(3)
    assert (caught.value.need_bytes, caught.value.free_bytes) == (3 * CHUNK_BYTES, 2 * CHUNK_BYTES)
    assert made.evict(3) == []
    assert names(made) == {"leased", "reading"}


def test_a_model_that_does_not_fit_gets_a_window_of_what_can_be_had() -> None:
    made = pool(10, ("idle", 3, 1.0), ("leased", 3, 2.0))
    made.lease(next(r for r in made if r.model_id == "leased"), 3.0)
    assert made.fit(11) == 7
    assert made.fit(8) == 7
    assert made.fit(7) == 7


def test_a_window_evicts_no_more_than_keeps_a_disk_busy() -> None:
    full = pool(100, ("idle", 90, 1.0))
    assert full.fit(101) == WINDOW_EVICTS_TO
    assert pool(100).fit(101) == WINDOW_CHUNKS_MAX


def test_without_room_for_a_window_the_pool_is_exhausted() -> None:
    made = pool(10)
    made.add("leased", 7, 1.0, whole=True)
    with pytest.raises(PoolExhausted):
        made.fit(11)


def test_a_pool_smaller_than_a_window_streams_all_the_same() -> None:
    assert pool(2).fit(3) == 2


def test_a_window_belongs_to_one_lease() -> None:
    made = pool(10)
    window = made.add("large", 10, 1.0, whole=False)
    assert made.find("large") is None
    made.release(window, 2.0)
    assert made.unwanted(window)
    made.free(window)
    assert made.chunks_free == 10


def test_a_failed_reading_keeps_its_chunks_until_the_last_lease_ends_and_nobody_joins_it() -> None:
    made = pool(10)
    failed = made.add("m", 4, 1.0, whole=True)
    made.lease(failed, 1.0)
    made.drop(failed)
    assert made.find("m") is None
    again = made.add("m", 4, 2.0, whole=True)
    made.release(failed, 3.0)
    assert not made.unwanted(failed)
    made.release(failed, 4.0)
    assert made.unwanted(failed)
    made.free(failed)
    assert made.find("m") is again
    assert made.chunks_free == 6


def test_a_model_without_leases_stays() -> None:
    made = pool(10, ("a", 4, 1.0))
    resident = made.find("a")
    assert isinstance(resident, Resident)
    assert not made.unwanted(resident)


def test_the_number_of_models_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "RESIDENTS_MAX", 2)
    assert make_room(pool(10, ("a", 1, 2.0), ("b", 1, 1.0)), 1) == ["b"]
