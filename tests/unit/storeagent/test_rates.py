import pytest

from stoker_storeagent.rates import ASSUMED_BYTES_PER_S, SAMPLE_S, Meter, Rate, seconds_for


def test_a_rate_is_the_median_of_the_last_sixteen() -> None:
    rate = Rate()
    assert rate.bytes_per_s == 0.0
    for size in (100, 110, 90, 1, 105):
        rate.add(size, 1.0)
    assert rate.bytes_per_s == 100.0
    for _ in range(16):
        rate.add(7, 1.0)
    assert rate.bytes_per_s == 7.0


@pytest.mark.parametrize(("size_bytes", "seconds"), [(0, 1.0), (1000, 0.0), (-5, 1.0), (1000, -1.0)])
def test_a_transfer_of_nothing_or_in_no_time_says_nothing(size_bytes: int, seconds: float) -> None:
    rate = Rate()
    rate.add(size_bytes, seconds)
    assert rate.bytes_per_s == 0.0


def test_a_time_is_told_even_while_the_rate_is_unknown() -> None:
    assert seconds_for(10**9, 0.0) == 10**9 / ASSUMED_BYTES_PER_S
    assert seconds_for(1000, 100.0) == 10.0


def test_transfers_at_once_share_a_link_so_its_rate_is_what_they_got_together() -> None:
    meter = Meter()
    meter.begin(0.0)
    meter.begin(0.0)
    for tick in range(1, 11):
        for _ in range(2):
            meter.add(50, tick * SAMPLE_S / 5)
    meter.end(10 * SAMPLE_S / 5)
    meter.end(10 * SAMPLE_S / 5)
    assert meter.total_bytes == 1000
    assert meter.bytes_per_s == pytest.approx(100 / (SAMPLE_S / 5), rel=0.15)


def test_the_time_between_transfers_does_not_count() -> None:
    meter = Meter()
    for begin_s in (0.0, 1000.0):
        meter.begin(begin_s)
        meter.add(100, begin_s + 1.0)
        meter.end(begin_s + 1.0)
    assert meter.bytes_per_s == 100.0


def test_a_short_transfer_counts_until_there_is_a_better_sample() -> None:
    meter = Meter()
    meter.begin(0.0)
    meter.add(10, SAMPLE_S / 10)
    assert meter.bytes_per_s == 0.0
    meter.end(SAMPLE_S / 10)
    short = meter.bytes_per_s
    assert short == pytest.approx(10 / (SAMPLE_S / 10))
    meter.begin(1.0)
    meter.add(1000, 1.0 + SAMPLE_S / 10)
    meter.end(1.0 + SAMPLE_S / 10)
    assert meter.bytes_per_s == short


def test_what_is_ended_was_begun() -> None:
    with pytest.raises(AssertionError):
        Meter().end(0.0)
