import pytest
from tests.support.storeagent_fakes import digests, model

from stoker_checkpoint.plan import CHUNK_BYTES

SIZES = (2 * CHUNK_BYTES + 5000, 4096, CHUNK_BYTES)


def test_positions_are_the_chunks_of_the_shards_in_the_order_of_the_files() -> None:
    made = model(sizes=SIZES)
    assert [made.place(position) for position in range(made.positions)] == [
        ("0.safetensors", 0, CHUNK_BYTES),
        ("0.safetensors", CHUNK_BYTES, CHUNK_BYTES),
        ("0.safetensors", 2 * CHUNK_BYTES, 5000),
        ("1.safetensors", 0, 4096),
        ("2.safetensors", 0, CHUNK_BYTES),
    ]
    assert sum(made.place(position)[2] for position in range(made.positions)) == made.weight_bytes == sum(SIZES)


def test_the_plan_has_the_same_positions() -> None:
    made = model(sizes=SIZES)
    assert len(made.plan.positions) == made.positions
    assert made.plan.read_bytes == made.weight_bytes


def test_a_checkpoint_has_no_digests_until_it_is_bound() -> None:
    made = model()
    assert not made.bound
    assert [made.digest(position) for position in range(made.positions)] == ["", "", ""]


def test_a_bound_checkpoint_has_the_digest_of_every_position() -> None:
    made = model(sizes=(2 * CHUNK_BYTES + 300, 5000))
    found = [f"digest {position}" for position in range(made.positions)]
    bound = made.with_digests(made.by_shard(found))
    assert bound.bound
    assert [bound.digest(position) for position in range(bound.positions)] == found
    assert not made.bound
    assert made.by_shard(found) == {"0.safetensors": tuple(found[:3]), "1.safetensors": (found[3],)}


def test_digests_of_other_positions_than_it_has_are_refused() -> None:
    made = model()
    with pytest.raises(ValueError):
        made.by_shard(digests(made)[:-1])


def test_one_manifest_is_planned_once() -> None:
    made, other = model(), model()
    assert made.plan is made.plan
    assert made.plan is not other.plan
    assert made.plan == other.plan
