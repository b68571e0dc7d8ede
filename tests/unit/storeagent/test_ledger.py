import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stoker_core.errors import TierFull
from stoker_storeagent.ledger import Ledger

NOW_S = 10_000.0


def ledger(capacity_bytes: int, **models: dict[str, int]) -> Ledger:
    """With models of these chunks (digest → bytes), each used a while after the one before it; all cost the same to refetch."""
    made = Ledger(capacity_bytes, lambda model_id, size_bytes: float(size_bytes))
    for number, (model_id, chunks) in enumerate(models.items()):
        held = dict(enumerate(chunks.items()))
        made.adopt(model_id, sum(chunks.values()), held, used_s=number * 1000.0)
    return made


def make_room(made: Ledger, model_id: str, size_bytes: int, now_s: float = NOW_S) -> list[str]:
    victims = made.reserve(model_id, size_bytes, size_bytes, now_s)
    for victim in victims:
        made.evict(victim)
    return victims


def names(made: Ledger) -> set[str]:
    return {shelf.model_id for shelf in made}


def test_nothing_is_evicted_while_there_is_room() -> None:
    assert make_room(ledger(100, old={"a": 30}), "x", 70) == []


def test_room_is_made_from_what_was_unused_for_longest() -> None:
    made = ledger(100, old={"a": 30}, middle={"b": 30}, new={"c": 40})
    assert sorted(make_room(made, "x", 50)) == ["middle", "old"]
    assert made.used_bytes == 90


def test_what_is_dear_to_have_again_stays() -> None:
    costs = {"dear": 100.0, "cheap": 1.0}
    made = Ledger(60, lambda model_id, size_bytes: costs[model_id])
    made.adopt("dear", 30, {0: ("a", 30)}, used_s=0.0)
    made.adopt("cheap", 30, {0: ("b", 30)}, used_s=500.0)
    assert made.reserve("x", 30, 30, 1000.0) == ["cheap"]


def test_a_use_counts_when_the_next_one_is_chosen() -> None:
    made = ledger(100, old={"a": 50}, new={"b": 50})
    made.used("old", NOW_S)
    made.used("unknown", NOW_S)
    assert make_room(made, "x", 50) == ["new"]


def test_pinned_models_and_those_that_chunks_are_on_their_way_to_are_never_evicted() -> None:
    made = ledger(100, leased={"a": 40})
    made.pin("leased")
    make_room(made, "filling", 40)
    made.arrived("filling", 0, "b", 10)
    with pytest.raises(TierFull) as caught:
        made.reserve("x", 50, 50, NOW_S)
    assert (caught.value.tier, caught.value.need_bytes, caught.value.free_bytes) == ("ssd", 50, 20)
    assert made.worst(NOW_S) == []
    assert names(made) == {"leased", "filling"}


def test_a_refused_reservation_changes_nothing() -> None:
    made = ledger(100, idle={"a": 30}, leased={"b": 40})
    made.pin("leased")
    with pytest.raises(TierFull):
        made.reserve("x", 70, 70, NOW_S)
    assert names(made) == {"idle", "leased"}
    assert made.used_bytes == 70


def test_a_model_may_go_once_every_pin_is_returned() -> None:
    made = ledger(100, a={"a": 40})
    made.pin("a")
    made.pin("a")
    assert made.pins("a") == 2
    made.unpin("a")
    assert made.worst(NOW_S) == []
    made.unpin("a")
    assert made.worst(NOW_S) == ["a"]
    with pytest.raises(AssertionError):
        made.unpin("a")


def test_one_at_a_time_brings_chunks_of_a_model() -> None:
    made = ledger(100)
    assert made.claim("m")
    assert not made.claim("m")
    assert made.claim("n")
    made.settle("m")
    assert made.claim("m")


def test_what_was_reserved_and_not_used_is_given_back() -> None:
    made = ledger(100)
    made.claim("m")
    made.reserve("m", 60, 60, NOW_S)
    made.arrived("m", 0, "a", 20)
    assert made.used_bytes == 60
    made.settle("m")
    assert (made.used_bytes, made.held_bytes("m")) == (20, 20)
    made.reserve("nothing came", 60, 60, NOW_S)
    made.settle("nothing came")
    assert names(made) == {"m"}


def test_a_chunk_of_two_models_counts_once_and_goes_with_the_last() -> None:
    made = ledger(100, a={"own a": 10, "both": 30}, b={"both": 30, "own b": 20})
    assert made.used_bytes == 60
    assert (made.held_bytes("a"), made.held_bytes("b")) == (40, 50)
    assert made.evict("a") == ["own a"]
    assert made.used_bytes == 50
    assert sorted(made.evict("b")) == ["both", "own b"]
    assert (made.used_bytes, dict(made.chunks)) == (0, {})


def test_a_chunk_twice_in_one_model_counts_once_and_goes_with_it() -> None:
    made = ledger(100)
    made.adopt("m", 60, {0: ("zeros", 30), 1: ("zeros", 30)}, 0.0)
    assert (made.used_bytes, made.held_bytes("m")) == (30, 60)
    assert made.evict("m") == ["zeros"]
    assert made.used_bytes == 0


def test_two_models_of_the_same_chunks_go_together_if_that_is_what_makes_room() -> None:
    made = ledger(100, one={"a": 40, "b": 40}, same={"a": 40, "b": 40}, new={"c": 20})
    assert sorted(make_room(made, "x", 70)) == ["one", "same"]
    assert made.used_bytes == 90


def test_of_models_that_share_chunks_no_more_go_than_must() -> None:
    made = ledger(100, one={"a": 40}, same={"a": 40}, other={"b": 40}, copy={"b": 40})
    assert sorted(make_room(made, "x", 50)) == ["one", "same"]
    made = ledger(80, one={"a": 40}, same={"a": 40}, other={"b": 40}, copy={"b": 40})
    made.pin("same")
    assert sorted(make_room(made, "x", 40)) == ["copy", "other"]


def test_a_chunk_that_is_no_good_is_lacked_by_all_whose_it_was() -> None:
    made = ledger(100, b={"both": 30, "own": 20}, a={"both": 30})
    assert made.lose("both") == ["a", "b"]
    assert made.lose("both") == []
    assert (made.held_bytes("a"), made.held_bytes("b"), made.used_bytes) == (0, 20, 20)
    assert made.evict("b") == ["own"]
    assert made.evict("a") == []


def test_a_tier_that_shrank_gives_up_what_does_not_fit_as_far_as_pins_allow() -> None:
    models = {"a": {"1": 30}, "b": {"2": 30}, "c": {"3": 20}}
    assert ledger(50, **models).excess(NOW_S) == ["a"]
    assert ledger(80, **models).excess(NOW_S) == []
    made = ledger(10, **models)
    made.pin("b")
    assert sorted(made.excess(NOW_S)) == ["a", "c"]


def test_a_tier_that_shrank_gives_up_models_of_the_same_chunks_too() -> None:
    assert sorted(ledger(10, a={"1": 30}, b={"1": 30}).excess(NOW_S)) == ["a", "b"]


SIZES = {f"d{number}": 4 * (number + 1) for number in range(8)}
MODELS = st.sampled_from(["a", "b", "c", "d"])
CHUNKS = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=5)


class Bookkeeping(RuleBasedStateMachine):
    """Models of four names, whose chunks are of eight kinds, so that many are shared. What is brought is pinned till then."""

    @initialize(capacity_bytes=st.integers(20, 120))
    def begin(self, capacity_bytes: int) -> None:
        self.made = Ledger(capacity_bytes, lambda model_id, size_bytes: size_bytes * (1.0 + ord(model_id)))
        self.wants: dict[str, list[str]] = {}  # of those that are being brought
        self.holds: dict[str, dict[int, str]] = {}
        self.pinned: set[str] = set()
        self.now_s = 0.0

    def bytes_of(self, digests: set[str]) -> int:
        return sum(SIZES[digest] for digest in digests)

    def reserved(self, model_id: str) -> int:
        done = self.holds.get(model_id, {})
        return sum(SIZES[d] for at, d in enumerate(self.wants[model_id]) if at not in done)

    @rule(model_id=MODELS, digests=CHUNKS, idle_s=st.integers(0, 500))
    def bring(self, model_id: str, digests: list[str], idle_s: int) -> None:
        if model_id in self.holds:
            return
        self.now_s += idle_s
        assert self.made.claim(model_id) == (model_id not in self.wants)
        if model_id in self.wants:
            return
        need_bytes = sum(SIZES[digest] for digest in digests)
        may_go = {m for m in self.holds if m not in self.pinned and m not in self.wants}
        stays = {d for m, of in self.holds.items() if m not in may_go for d in of.values()}
        fits = self.bytes_of(stays) + sum(map(self.reserved, self.wants)) + need_bytes <= self.made.capacity_bytes
        try:
            victims = self.made.reserve(model_id, need_bytes, need_bytes, self.now_s)
        except TierFull:
            assert not fits, "the room could be had"
            self.made.settle(model_id)
            return
        assert fits
        assert set(victims) <= may_go
        assert len(set(victims)) == len(victims)
        for victim in victims:
            self.leave(victim)
        self.wants[model_id] = digests
        self.made.pin(model_id)

    @precondition(lambda self: any(map(self.reserved, self.wants)))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        model_id = data.draw(st.sampled_from(sorted(m for m in self.wants if self.reserved(m))))
        held = self.holds.setdefault(model_id, {})
        at = data.draw(st.sampled_from([at for at in range(len(self.wants[model_id])) if at not in held]))
        held[at] = self.wants[model_id][at]
        self.made.arrived(model_id, at, held[at], SIZES[held[at]])

    @precondition(lambda self: self.wants)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        model_id = data.draw(st.sampled_from(sorted(self.wants)))
        del self.wants[model_id]
        self.made.settle(model_id)
        self.made.unpin(model_id)

    @rule(model_id=MODELS)
    def pin_or_unpin(self, model_id: str) -> None:
        if model_id in self.pinned:
            self.made.unpin(model_id)
        else:
            self.made.pin(model_id)
        self.pinned ^= {model_id}

    @rule(model_id=MODELS)
    def leave(self, model_id: str) -> None:
        if model_id in self.wants:
            return
        held = set(self.holds.pop(model_id, {}).values())
        others = {d for of in self.holds.values() for d in of.values()}
        orphans = self.made.evict(model_id)
        assert sorted(orphans) == sorted(held - others)

    @rule(digest=st.sampled_from(sorted(SIZES)))
    def lose(self, digest: str) -> None:
        if any(digest in of for of in self.wants.values()):  # what is to come for it is Shelving's business
            return
        owners = sorted(m for m, of in self.holds.items() if digest in of.values())
        assert self.made.lose(digest) == owners
        for of in self.holds.values():
            for at in [at for at, d in of.items() if d == digest]:
                del of[at]

    @invariant()
    def books_are_right(self) -> None:
        chunks = {d for of in self.holds.values() for d in of.values()}
        assert dict(self.made.chunks) == {d: SIZES[d] for d in chunks}
        assert self.made.used_bytes == self.bytes_of(chunks) + sum(map(self.reserved, self.wants))
        assert self.made.used_bytes <= self.made.capacity_bytes
        assert set(self.made.worst(self.now_s)) <= self.holds.keys() - self.pinned - self.wants.keys()
        for model_id, of in self.holds.items():
            assert self.made.held_bytes(model_id) == sum(SIZES[d] for d in of.values())


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
