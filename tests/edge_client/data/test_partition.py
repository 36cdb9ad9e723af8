"""What a partition promises: nothing lost, the shares asked for, clear refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from device_profiles.errors import InputError
from edge_client.data import partition as partition_module
from edge_client.data.instructions import Example, load_instructions
from edge_client.data.partition import PARTITIONS, Part, clusters, partition
from quantization.errors import MissingExtraError

KIT = load_instructions("kit").examples
ANIMALS = ("heron", "otter", "badger", "kestrel", "vole", "newt")
SUMS = ("integral", "matrix", "quotient", "prime", "vertex", "lemma")


def example(
    text: str = "Say it.",
    category: str | None = None,
    split: Literal["train", "held_out"] | None = None,
) -> Example:
    return Example(instruction=text, output=text, category=category, split=split)


def rows(*sizes: int) -> list[Example]:
    """Return unmarked examples in as many categories as there are sizes."""
    return [example(category=f"c{i:03}") for i, size in enumerate(sizes) for _ in range(size)]


def divide(
    examples: Sequence[Example],
    *,
    clients: int = 4,
    kind: str = "iid",
    alpha: float = 0.5,
    skew: float = 0.0,
    held_out_share: float = 0.2,
    seed: int = 0,
) -> list[Part]:
    return partition(
        examples,
        clients=clients,
        kind=kind,
        alpha=alpha,
        skew=skew,
        held_out_share=held_out_share,
        seed=seed,
    )


def size(part: Part) -> int:
    return len(part.train) + len(part.held_out)


def largest_group_share(parts: list[Part]) -> float:
    """Return the mean over clients of the share of the client's largest group."""
    return float(np.mean([max(part.groups.values()) / size(part) for part in parts]))


def vocabulary_text(words: Sequence[str], seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(words, 12))


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(sorted(PARTITIONS)),
    clients=st.integers(1, 4),
    categories=st.integers(1, 5),
    marked=st.booleans(),
    categorised=st.booleans(),
    skew=st.sampled_from([0.0, 0.7, 1.5]),
    alpha=st.sampled_from([0.2, 1.0, 50.0]),
    data=st.data(),
)
def test_every_example_is_in_exactly_one_place_and_no_part_is_empty(
    *,
    kind: str,
    clients: int,
    categories: int,
    marked: bool,
    categorised: bool,
    skew: float,
    alpha: float,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999), label="data seed"))
    count = data.draw(st.integers(10 * clients, 10 * clients + 25), label="examples")
    examples = [
        example(
            vocabulary_text(ANIMALS + SUMS, int(rng.integers(1000))),
            category=f"c{rng.integers(categories)}" if categorised or kind == "category" else None,
            split=rng.choice(["train", "held_out"], p=[0.7, 0.3]) if marked else None,
        )
        for _ in range(count)
    ]
    try:
        parts = divide(
            examples,
            clients=clients,
            kind=kind,
            alpha=alpha,
            skew=skew,
            seed=data.draw(st.integers(0, 2**40), label="seed"),
        )
    except InputError:  # too uneven for so few examples; the refusals have their own tests
        reject()
    assert len(parts) == clients
    assert sorted(i for p in parts for i in (*p.train, *p.held_out)) == list(range(count))
    for part in parts:
        assert part.train
        assert part.held_out
        assert list(part.train) == sorted(part.train)
        assert list(part.held_out) == sorted(part.held_out)
        assert sum(part.groups.values()) == size(part)
        if marked:
            assert {examples[i].split for i in part.train} == {"train"}
            assert {examples[i].split for i in part.held_out} == {"held_out"}
        if categorised and kind != "cluster":
            own = Counter(examples[i].category for i in (*part.train, *part.held_out))
            assert part.groups == own


@settings(max_examples=40, deadline=None)
@given(clients=st.integers(1, 12), spare=st.integers(0, 30), seed=st.integers(0, 2**40))
def test_iid_needs_two_examples_a_client_and_deals_sizes_that_differ_by_at_most_one(
    clients: int, spare: int, seed: int
) -> None:
    parts = divide(rows(2 * clients + spare), clients=clients, seed=seed)
    sizes = [size(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_iid_gives_every_client_the_mixture_of_the_whole() -> None:
    # 270 of 1080 drawn, 1/8 of them in each category: 33.75 expected, with a standard deviation
    # of sqrt(270 * 1/8 * 7/8 * 3/4) = 4.7 (hypergeometric); the bounds are 4 of them away.
    parts = divide(KIT, clients=4)
    counts = [count for part in parts for count in part.groups.values()]
    assert len(counts) == 4 * 8
    assert all(15 <= count <= 53 for count in counts)
    # The shuffle is of all examples: an exact quarter of every category would be no chance.
    assert not all(33 <= count <= 34 for count in counts)


def test_category_shards_give_four_clients_two_whole_categories_each() -> None:
    # Eight shards of 1080 / 8 = 135 examples are the kit's eight categories, 108 + 27 each.
    for part in divide(KIT, clients=4, kind="category"):
        assert sorted(part.groups.values()) == [135, 135]
        assert len(part.train) == 216
        assert len(part.held_out) == 54


@pytest.mark.parametrize("clients", [9, 20, 50])
def test_a_client_with_two_shards_sees_at_most_four_categories(clients: int) -> None:
    # A shard is shorter than a category, so it crosses at most one border.
    for seed in range(5):
        parts = divide(KIT, clients=clients, kind="category", seed=seed)
        assert max(len(part.groups) for part in parts) <= 4


def test_shards_go_to_clients_by_chance() -> None:
    parts = [divide(KIT, clients=4, kind="category", seed=seed) for seed in range(4)]
    assert len({tuple(tuple(part.groups) for part in run) for run in parts}) > 1


def test_dirichlet_shares_have_the_variance_of_the_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partition_module, "MAX_GROUPS", 300)  # name every group
    # Var of one of K = 4 shares at alpha = 1: (1/4)(3/4) / (4 * 1 + 1) = 0.0375. With 300 groups
    # the estimate has a standard error of about 4 %; rounding to 50 examples adds (1/50)^2 / 6.
    parts = divide(rows(*[50] * 300), clients=4, kind="dirichlet", alpha=1.0)
    shares = [part.groups.get(f"c{i:03}", 0) / 50 for part in parts for i in range(300)]
    assert np.mean(shares) == pytest.approx(0.25)
    assert np.var(shares) == pytest.approx(0.0375, rel=0.15)


def test_clients_differ_more_at_a_small_alpha_than_at_a_large_one() -> None:
    few = [
        largest_group_share(divide(KIT, clients=5, kind="dirichlet", alpha=0.1, seed=seed))
        for seed in range(5)
    ]
    all_alike = [
        largest_group_share(divide(KIT, clients=5, kind="dirichlet", alpha=1e6, seed=seed))
        for seed in range(5)
    ]
    assert min(few) > 0.35
    # 135 examples of each of eight categories over five equal clients: 27 of 216 each.
    assert max(all_alike) == pytest.approx(1 / 8, rel=0.05)


def test_small_groups_do_not_all_go_to_the_same_clients() -> None:
    # 60 groups of 3 examples, equal shares of 10 clients: 18 each if rounding is fair, and none
    # for seven of them if every group is rounded alike.
    parts = divide(rows(*[3] * 60), clients=10, kind="dirichlet", alpha=1e9)
    assert min(size(part) for part in parts) >= 5


@pytest.mark.parametrize("alpha", [5e-324, 1.7e308])
def test_extreme_alphas_still_divide_everything(alpha: float) -> None:
    parts = divide(rows(*[30] * 20), clients=2, kind="dirichlet", alpha=alpha)
    assert sum(size(part) for part in parts) == 600


@pytest.mark.parametrize("kind", ["iid", "category"])
def test_skew_gives_sizes_of_a_power_law(kind: str) -> None:
    # Weights 1, 1/2, 1/3, 1/4 add up to 25/12; 1200 examples make 576, 288, 192, 144.
    parts = divide(rows(*[300] * 4), clients=4, kind=kind, skew=1.0)
    assert sorted(size(part) for part in parts) == [144, 192, 288, 576]


def test_skew_multiplies_the_shares_of_a_dirichlet_draw() -> None:
    # At a large alpha the drawn shares are equal, so the weights alone remain: 1 and 1/4 of 5/4.
    parts = divide(rows(500, 500), clients=2, kind="dirichlet", alpha=1e9, skew=2.0)
    assert sorted(size(part) for part in parts) == [200, 800]


def test_the_largest_client_is_not_always_the_first() -> None:
    largest = set()
    for seed in range(10):
        sizes = [size(part) for part in divide(rows(100), clients=4, skew=1.0, seed=seed)]
        largest.add(sizes.index(max(sizes)))
    assert len(largest) > 1


@pytest.mark.parametrize("kind", ["category", "dirichlet"])
def test_held_out_parts_have_the_mixture_of_the_training_parts(kind: str) -> None:
    # A slice of share s is within 1 of 108 s training and of 27 s held-out examples, so a quarter
    # of the one is within 1 + 1/4 of the other; a client may have two slices of a category.
    for part in divide(KIT, clients=5, kind=kind):
        train = Counter(KIT[i].category for i in part.train)
        held_out = Counter(KIT[i].category for i in part.held_out)
        for name in part.groups:
            assert abs(train[name] / 4 - held_out[name]) <= 2.5
        assert len(part.held_out) >= 0.1 * size(part)


def test_an_unmarked_hold_out_is_spread_evenly_over_the_groups() -> None:
    # A fifth of eight groups of ten: two of each.
    examples = rows(*[10] * 8)
    (part,) = divide(examples, clients=1)
    assert set(Counter(examples[i].category for i in part.held_out).values()) == {2}
    assert len(part.held_out) == 16


def test_a_single_held_out_example_is_not_taken_from_a_small_group() -> None:
    (part,) = divide(rows(1, 8, 1), clients=1, held_out_share=0.1)
    assert len(part.held_out) == 1
    assert 1 <= part.held_out[0] <= 8


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_two_examples_are_one_to_train_on_and_one_held_out(share: float) -> None:
    for part in divide(rows(6), clients=3, held_out_share=share):
        assert len(part.train) == len(part.held_out) == 1


@pytest.mark.parametrize("kind", sorted(PARTITIONS))
def test_the_seed_alone_decides(kind: str) -> None:
    np.random.seed(1)  # noqa: NPY002 - the global stream must not matter
    first = divide(KIT, kind=kind, seed=3)
    np.random.seed(2)  # noqa: NPY002
    assert divide(KIT, kind=kind, seed=3) == first
    assert divide(KIT, kind=kind, seed=4) != first


def test_string_hashing_does_not_change_the_parts() -> None:
    program = (
        "from edge_client.data.instructions import load_instructions\n"
        "from edge_client.data.partition import partition\n"
        "print(partition(load_instructions('kit').examples, clients=6, kind='dirichlet',"
        " alpha=0.3, skew=0.5, seed=1))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    expected = divide(KIT, clients=6, kind="dirichlet", alpha=0.3, skew=0.5, seed=1)
    assert said == {f"{expected}\n"}


def test_clusters_are_exactly_two_vocabularies_and_the_larger_comes_first() -> None:
    # Five examples make 5 // 2 = 2 clusters.
    words = [SUMS, ANIMALS, ANIMALS, SUMS, ANIMALS]
    examples = [example(vocabulary_text(chosen, i)) for i, chosen in enumerate(words)]
    assert clusters(examples) == [f"cluster-{int(chosen is SUMS)}" for chosen in words]


def test_clusters_never_mix_two_vocabularies_and_are_named_by_falling_size() -> None:
    examples = [example(vocabulary_text((ANIMALS, SUMS)[i % 2], i)) for i in range(40)]
    names = clusters(examples)
    assert not set(names[0::2]) & set(names[1::2])
    sizes = Counter(names)
    assert 2 <= len(sizes) <= 8
    ordered = [sizes[f"cluster-{i}"] for i in range(len(sizes))]
    assert ordered == sorted(ordered, reverse=True)
    assert min(ordered) > 0


def test_cluster_goes_by_the_text_even_where_there_are_categories() -> None:
    examples = [
        example(vocabulary_text((ANIMALS, SUMS)[i % 2], i), category=f"c{i % 3}") for i in range(40)
    ]
    names = clusters(examples)
    for part in divide(examples, clients=2, kind="cluster"):
        assert part.groups == Counter(names[i] for i in (*part.train, *part.held_out))


def test_one_missing_category_makes_dirichlet_use_clusters() -> None:
    examples = [*rows(20, 20), example()]
    names = {name for part in divide(examples, clients=2, kind="dirichlet") for name in part.groups}
    assert names
    assert all(name.startswith("cluster-") for name in names)


@pytest.mark.parametrize("text", ["the same words", "!?"])
def test_texts_that_are_all_alike_make_one_cluster(text: str) -> None:
    assert clusters([example(text)] * 6) == ["cluster-0"] * 6


def test_clusters_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"pwff\[edge\]"):
        divide([example() for _ in range(10)], clients=2)


def test_categories_need_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    for kind in ("iid", "category", "dirichlet"):
        assert len(divide(KIT, kind=kind)) == 4


def test_a_dirichlet_draw_that_leaves_a_client_empty_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(seed: int) -> bool:
        try:
            divide(KIT, clients=8, kind="dirichlet", alpha=0.05, seed=seed)
        except InputError:
            return True
        return False

    assert not any(refused(seed) for seed in range(8))
    monkeypatch.setattr(partition_module, "MAX_DRAWS", 1)
    assert any(refused(seed) for seed in range(8))


def test_clients_that_stay_empty_are_refused_with_the_remedy() -> None:
    # One category at so small an alpha goes to one client whole.
    with pytest.raises(
        InputError,
        match=r"'dirichlet' with alpha 0.0001 .* 50 draws .*client \d+ of 5\); "
        r"use fewer clients, a larger alpha, or more data",
    ):
        divide(rows(40), clients=5, kind="dirichlet", alpha=1e-4)


def test_sizes_too_skewed_for_the_data_are_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"'iid' .* skew 9 .*a smaller skew, or more data"):
        divide(rows(40), clients=5, skew=9.0)


@pytest.mark.parametrize("kind", sorted(PARTITIONS))
def test_a_skew_whose_weights_vanish_is_refused_like_any_other(kind: str) -> None:
    with pytest.raises(InputError, match="a smaller skew"):
        divide(rows(100), clients=5, kind=kind, alpha=1e-4, skew=1e4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 0}, r"clients = 0 .* at least 1"),
        ({"alpha": 0.0}, r"alpha = 0.0 .* above 0 and finite"),
        ({"alpha": -1.0}, r"alpha = -1.0 "),
        ({"alpha": float("inf")}, r"alpha = inf "),
        ({"alpha": float("nan")}, r"alpha = nan "),
        ({"skew": -0.1}, r"skew = -0.1 .* at least 0"),
        ({"skew": float("inf")}, r"skew = inf "),
        ({"held_out_share": 0.0}, r"held_out_share = 0.0 .* between 0 and 1"),
        ({"held_out_share": 1.0}, r"held_out_share = 1.0 "),
        ({"kind": "dirichle"}, r"unknown partition 'dirichle'; did you mean 'dirichlet'\?"),
        ({"clients": 21}, r"21 clients need at least 42 examples, and the data has 40; use fewer"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        divide(rows(20, 20), **arguments)  # type: ignore[arg-type]


def test_missing_categories_are_counted_and_clusters_suggested() -> None:
    with pytest.raises(InputError, match=r"2 of 12 rows lack one; .*'cluster'"):
        divide([*rows(10), example(), example(category="")], kind="category")


def test_each_marked_split_must_have_an_example_a_client() -> None:
    examples = [example(category="c", split="train") for _ in range(20)]
    examples += [example(category="c", split="held_out") for _ in range(3)]
    assert len(divide(examples, clients=3)) == 3
    with pytest.raises(InputError, match=r"at least 4 examples marked held_out, .* has 3"):
        divide(examples, clients=4)


def test_a_data_set_marked_only_in_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"20 of 21 rows carry no split"):
        divide([*rows(20), example(category="c", split="train")])


def test_more_groups_than_a_record_names_are_counted_together() -> None:
    examples = [
        Example(instruction=f"Say {i}", output="word", category=f"kind {i // 2}")
        for i in range(200)
    ]
    (part,) = partition(examples, clients=1, kind="iid", alpha=1.0, skew=0.0, seed=0)
    # 100 groups of two rows: 63 are named, the other 37 hold 74 rows
    assert len(part.groups) == 64
    assert part.groups["other"] == 74
    assert sum(part.groups.values()) == 200
