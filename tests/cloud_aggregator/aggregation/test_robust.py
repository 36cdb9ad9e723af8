"""Rules that a minority cannot steer: by hand, against slow implementations, and under attack."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.aggregation import RULES, aggregate, check_rule, fewest_updates, robust
from cloud_aggregator.aggregation.mean import mean_of_tensors
from cloud_aggregator.aggregation.product import mean_of_products
from cloud_aggregator.aggregation.robust import (
    RobustSettings,
    Updates,
    check_update,
    clip,
    krum,
    median,
    norm,
    trimmed_mean,
)
from device_profiles.errors import InputError
from messaging.errors import ProtocolError
from messaging.layout import Layout, TensorSpec, Vector

ALL = RobustSettings(clip_norm=1.0, trim_share=0.25, byzantine=1)
NOTHING = RobustSettings()


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def again(*vectors: Vector, examples: int = 1) -> Updates:
    """Return what can be read as often as wanted, as the spool can."""
    return lambda: ((v, examples) for v in vectors)


def flat(size: int) -> Layout:
    return Layout((TensorSpec(name="adapters.0.mlp.up.bias", shape=(size,)),))


def applied(rule: str, vectors: list[Vector], settings: RobustSettings = ALL) -> Vector:
    """Return the change of a state of zeros."""
    size = max(v.size for v in vectors)
    return aggregate(rule, np.zeros(size, np.float32), again(*vectors), flat(size), settings)


# -- by hand --------------------------------------------------------------------------------------


def test_the_median_is_the_middle_value_or_the_mean_of_the_two() -> None:
    odd = again(vector(1, 9), vector(5, -2), vector(3, 0))
    assert median(odd, 2, NOTHING).tolist() == [3.0, 0.0]
    even = again(vector(1), vector(7), vector(2), vector(100))
    assert median(even, 1, NOTHING).tolist() == [4.5]


def test_the_trimmed_mean_leaves_the_same_number_out_at_each_end() -> None:
    # floor(0.25 * 5) = 1: without 1 and 100, (2 + 3 + 7) / 3
    five = again(*(vector(x) for x in (3, 100, 1, 7, 2)))
    assert trimmed_mean(five, 1, ALL).tolist() == [4.0]
    # floor(0.25 * 3) = 0: the plain mean
    assert trimmed_mean(again(vector(1), vector(2), vector(9)), 1, ALL).tolist() == [4.0]
    # 0.29 * 100 is 28.999999999999996 in binary: 29 are left out, and 42 of the 100 remain
    values = [vector(0)] * 29 + [vector(1)] * 42 + [vector(1000)] * 29
    share = RobustSettings(trim_share=0.29)
    assert trimmed_mean(again(*values), 1, share).tolist() == [1.0]


def test_a_long_update_is_shortened_and_a_short_one_counts_whole() -> None:
    # (3, 4) has norm 5 and becomes (0.6, 0.8); (0.5, 0) stays; every one counts once
    state = aggregate(
        "norm-clipped",
        vector(10, 20),
        lambda: iter([(vector(3, 4), 1000), (vector(0.5, 0), 1)]),
        flat(2),
        ALL,
    )
    # (0.6 + 0.5) / 2 and 0.8 / 2; half a unit in the last place of float32 near 20, twice
    np.testing.assert_allclose(state, [10.55, 20.4], rtol=0, atol=2e-6)
    assert clip(vector(0, 0), 1.0).tolist() == [0.0, 0.0]


def test_krum_drops_the_update_that_lies_apart_and_averages_the_others() -> None:
    # byzantine = 1 of 5: the scores are of the 2 nearest others. On a line 0, 1, 2, 3, 50 they are
    # 1+4, 1+1, 1+1, 1+4, 47**2+48**2: 50 is left out, the mean is 1.5.
    line = [vector(x) for x in (0, 1, 50, 2, 3)]
    assert krum(again(*line), 1, ALL).tolist() == [1.5]


def test_krum_needs_two_f_plus_three_updates() -> None:
    four = again(*[vector(1.0)] * 4)
    with pytest.raises(InputError, match="byzantine = 1 takes 5 updates and has 4"):
        krum(four, 1, ALL)
    assert fewest_updates("krum", ALL) == 5
    assert fewest_updates("median", ALL) == 1


def test_an_update_beyond_the_norm_limit_is_refused_with_its_code() -> None:
    check_update(vector(3, 4), 5.0)
    for bad in (vector(3, 4.001), vector(math.nan, 0), vector(math.inf, 0)):
        with pytest.raises(ProtocolError) as caught:
            check_update(bad, 5.0)
        assert caught.value.code == "norm"


def test_the_norm_is_summed_in_float64() -> None:
    # in float32 the square of 1e25 is infinite
    assert norm(vector(1e25, 0)) == pytest.approx(1e25, rel=1e-7)  # 1e25 rounded to float32


# -- against slow implementations -----------------------------------------------------------------

UNEVEN = st.lists(
    st.lists(st.integers(-1000, 1000), min_size=0, max_size=5), min_size=1, max_size=7
)


@given(UNEVEN, st.sampled_from([0.0, 0.1, 0.25, 0.4]))
def test_each_coordinate_is_of_its_holders_alone(rows: list[list[int]], share: float) -> None:
    updates = again(*(vector(*row) for row in rows))
    medians = median(updates, 6, NOTHING)
    trimmed = trimmed_mean(updates, 6, RobustSettings(trim_share=share))
    for i in range(6):
        held = sorted(row[i] for row in rows if len(row) > i)
        if not held:
            assert medians[i] == trimmed[i] == 0
            continue
        out = int(share * 100) * len(held) // 100
        kept = held[out : len(held) - out]
        # integers and their halves are exact; the quotient is one rounding in each precision
        assert medians[i] == np.float32(statistics.median(held))
        assert trimmed[i] == np.float32(sum(kept) / len(kept))


def slow_krum(rows: list[Vector], bad: int, size: int) -> list[int]:
    """Return which are kept, by every pair's difference."""
    scores = []
    for i, a in enumerate(rows):
        others = []
        for j, b in enumerate(rows):
            if i != j:
                both = min(len(a), len(b))
                gap = a[:both].astype(np.float64) - b[:both]
                others.append(float((gap**2).sum()) * size / both)
        scores.append(sum(sorted(others)[: len(rows) - bad - 2]))
    worst = sorted(range(len(rows)), key=lambda i: scores[i])[len(rows) - bad :]
    return sorted(set(range(len(rows))) - set(worst))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lengths", [[40] * 9, [40, 40, 25, 40, 25, 40, 10, 40, 40]])
def test_krum_keeps_what_the_distances_of_all_pairs_keep(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal(n).astype(np.float32) for n in lengths]
    kept = slow_krum(rows, 2, 40)
    assert len(kept) == 7
    got = krum(again(*rows), 40, RobustSettings(byzantine=2))
    for i in range(40):
        held = [float(rows[k][i]) for k in kept if len(rows[k]) > i]
        # float64 sums in one order or another, then one rounding to float32
        assert got[i] == pytest.approx(sum(held) / len(held), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "krum"])
def test_small_blocks_give_what_one_block_gives(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    rows = [rng.standard_normal(n).astype(np.float32) for n in (90, 60, 90, 60, 30, 90)]
    whole = applied(rule, rows)
    monkeypatch.setattr(robust, "BLOCK_BYTES", 300)  # 12 to 37 coordinates at a time
    assert applied(rule, rows).tobytes() == whole.tobytes()


def test_blocks_stay_within_their_bytes_and_updates_are_read_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(robust, "BLOCK_BYTES", 400)
    passes: list[int] = []

    def updates() -> Iterator[tuple[Vector, int]]:
        passes.append(0)
        for i in range(10):
            passes[-1] += 1
            yield np.full(100, i, np.float32), 1

    assert median(updates, 100, NOTHING).tolist() == [4.5] * 100
    # 400 bytes hold 10 coordinates of 10 devices: 10 blocks, after one pass for the lengths
    assert passes == [10] * 11
    sizes = [block.nbytes for _, block in robust._blocks(updates, [100] * 10, 4)]
    assert max(sizes) <= 400


# -- a bad minority -------------------------------------------------------------------------------


def honest(count: int, size: int) -> list[Vector]:
    """Return updates whose every entry lies in [0, 1]."""
    rng = np.random.default_rng(8)
    return [rng.random(size).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("lie", [1e5, -1e5])
def test_one_bad_update_moves_the_mean_and_none_of_the_robust_rules(lie: float) -> None:
    good = honest(6, 20)
    rows = [*good[:3], np.full(20, lie, np.float32), *good[3:]]
    # the sum of seven is within 6 of the lie
    assert (np.abs(applied("mean", rows)) >= (1e5 - 6) / 7 - 0.01).all()
    for rule in ("trimmed-mean", "median", "krum"):
        # sorted, the lie is first or last: what is left lies between honest values
        got = applied(rule, rows)
        assert (got >= np.min(good, axis=0)).all(), rule
        assert (got <= np.max(good, axis=0)).all(), rule
    # of norm 1 each, a lie moves the mean of seven by 1/7 at most
    clipped = applied("norm-clipped", rows)
    without = applied("norm-clipped", good) * np.float32(6 / 7)
    assert norm(clipped - without) <= 1 / 7 + 1e-6  # a rounding of float32


def test_a_claim_of_many_examples_moves_the_mean_alone() -> None:
    rows = [vector(0.0)] * 6 + [vector(0.9)]
    claims = [(v, 1) for v in rows[:-1]] + [(rows[-1], 10**9)]
    moved = {
        rule: float(aggregate(rule, vector(0.0), lambda: iter(claims), flat(1), ALL)[0])
        for rule in RULES
    }
    assert moved.pop("mean") > 0.89
    # one of seven: 0.9 / 7 where it counts at all
    assert moved == {
        "norm-clipped": pytest.approx(0.9 / 7, rel=1e-6),
        "trimmed-mean": 0.0,
        "median": 0.0,
        "krum": 0.0,
    }


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "krum"])
def test_the_order_of_the_clients_changes_nothing(rule: str) -> None:
    rows = honest(5, 8)
    orders = itertools.islice(itertools.permutations(rows), 0, 120, 7)
    results = [applied(rule, list(order)) for order in orders]
    for other in results[1:]:
        # krum adds the kept ones in the order given, in float64: a rounding of float32 at most
        np.testing.assert_allclose(other, results[0], rtol=1e-7 if rule == "krum" else 0)


# -- the table ------------------------------------------------------------------------------------


def test_the_rule_mean_has_the_bits_of_the_plain_average() -> None:
    rows = honest(4, 10)
    state = honest(1, 10)[0]
    plain = mean_of_tensors(state, [(v, 3) for v in rows], flat(10))
    got = aggregate("mean", state, again(*rows, examples=3), flat(10), NOTHING)
    assert got.tobytes() == plain.tobytes()


def test_norm_clipped_goes_with_products() -> None:
    site = "transformer.h.0.attn.c_attn.query"
    layout = Layout(
        (
            TensorSpec(name=f"{site}.lora_A.weight", shape=(1, 2), scale_axis=0),
            TensorSpec(name=f"{site}.lora_B.weight", shape=(2, 1), scale_axis=1),
        )
    )
    state, long = vector(1, 1, 0, 0), vector(3, 0, 4, 0)
    got = aggregate("norm-clipped", state, again(long, long), layout, ALL, average="product")
    # (3, 0, 4, 0) has norm 5: a fifth of it counts
    expected = mean_of_products(state, [(vector(0.6, 0, 0.8, 0), 1)] * 2, layout)
    np.testing.assert_allclose(got, expected, atol=1e-6)  # roundings of float32 near 1


@pytest.mark.parametrize(
    ("rule", "settings", "average", "private", "message"),
    [
        ("krum", ALL, "product", False, "compares updates entry by entry"),
        ("median", ALL, "product", False, "choose the rule mean or norm-clipped"),
        ("krum", NOTHING, "tensors", False, "needs byzantine"),
        ("norm-clipped", NOTHING, "tensors", False, "needs clip_norm"),
        ("trimmed-mean", NOTHING, "tensors", False, "needs trim_share"),
        ("medain", ALL, "tensors", False, "unknown aggregation rule 'medain'.*median"),
        ("median", ALL, "tensors", True, "differential privacy"),
        ("mean", ALL, "product", True, "differential privacy"),
    ],
)
def test_what_does_not_go_together_is_refused(
    rule: str, settings: RobustSettings, average: str, private: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_rule(rule, settings, average=average, private=private)


@pytest.mark.parametrize(
    "field", [{"clip_norm": 0.0}, {"clip_norm": math.nan}, {"trim_share": 0.5}, {"byzantine": -1}]
)
def test_settings_out_of_range_are_refused_by_name(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(field))} = "):
        RobustSettings(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_without_an_update_or_with_too_long_a_one_fails(rule: str) -> None:
    with pytest.raises(ValueError, match="at least one"):
        aggregate(rule, vector(0.0), again(), flat(1), ALL)
    with pytest.raises(ValueError, match="an update of 2 entries; at most 1"):
        aggregate(rule, vector(0.0), again(*[vector(0.1, 0.2)] * 5), flat(1), ALL)
