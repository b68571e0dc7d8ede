"""Identifiers."""

from __future__ import annotations

import os
import random
import re
import warnings

from stoker_core.ids import RandomIds, SequentialIds


def test_ids_do_not_repeat() -> None:
    ids = RandomIds()
    assert len({ids.new("x") for _ in range(10_000)}) == 10_000


def test_ids_are_one_subject_token_each() -> None:
    assert all(re.fullmatch(r"inst-[0-9a-z]{21}", RandomIds().new("inst")) for _ in range(100))


def test_ids_do_not_come_from_a_seeded_generator() -> None:
    ids = RandomIds()
    random.seed(1)
    first = {ids.new("x") for _ in range(100)}
    random.seed(1)
    assert first.isdisjoint(ids.new("x") for _ in range(100))


def test_forked_siblings_make_different_ids() -> None:
    ids = RandomIds()
    ids.new("x")  # whatever state there is, the children inherit it
    children = [_ids_of_a_fork(ids) for _ in range(4)]
    made = [one for child in children for one in child]
    assert len(made) == 4 * 50
    assert len(set(made)) == len(made)
    assert len({one[-12:] for one in made}) == len(made), "the random part differs, not only the time"


def _ids_of_a_fork(ids: RandomIds) -> list[str]:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of other threads; this child starts none
        pid = os.fork()
    if pid == 0:
        os.write(writing, "\n".join(ids.new("x") for _ in range(50)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        made = pipe.read().split("\n")
    os.waitpid(pid, 0)
    return made


def test_ids_sort_by_time_of_making(monkeypatch: object) -> None:
    import time

    now_ns = 1_700_000_000_000_000_000
    made = []
    real = time.time_ns
    try:
        for step in range(50):
            time.time_ns = lambda step=step: now_ns + step * 7_000_000_000  # type: ignore[misc]
            made.append(RandomIds().new("x"))
    finally:
        time.time_ns = real
    assert made == sorted(made)


def test_sequential_ids_count_up() -> None:
    ids = SequentialIds()
    assert [ids.new("a"), ids.new("b"), ids.new("a")] == ["a-1", "b-2", "a-3"]
