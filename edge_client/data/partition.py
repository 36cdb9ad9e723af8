"""Divides a data set's examples among clients: alike, by topic or by Dirichlet shares.

A partition is a set of shares: which fraction of each group's examples goes to which client. The
training and the held-out examples are cut by the same shares, so that a client is measured on
the mixture it learns from. Sources: McMahan et al. 2017 (two shards a client), Hsu et al. 2019
(Dirichlet shares).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from device_profiles import seeds
from device_profiles.config_files import choose
from device_profiles.errors import InputError
from edge_client.data.instructions import Example
from quantization.errors import MissingExtraError

MAX_DRAWS = 50
MAX_GROUPS = 64  # what a device's record names one by one
OTHER = "other"
MAX_CLUSTERS = 8
SHARDS_A_CLIENT = 2
_VOCABULARY = 8192  # most frequent words; bounds the memory for a data set of any size
_EVEN_ALPHA = 1e12  # above it shares are equal to about 1e-6, and the gamma draws could overflow
_LEAST_WEIGHT = 1e-12  # of the largest: below one example of any data, and never 0

# For each group: the client (index) of each successive slice, and the slice's relative length.
Slices = dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One client's examples, as ascending indices into the data set's examples.

    Attributes:
        train: What the client learns from, at least 1.
        held_out: What it is measured on, at least 1.
        groups: Examples (``train`` and ``held_out``) from each category or cluster, >= 1 each; of
            more than 64, the smallest together as ``other``.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    groups: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a cut may depend on; the clients' ``weights``, shape (K,), are relative sizes."""

    sizes: Mapping[str, int]
    weights: NDArray[np.float64]
    alpha: float
    rng: np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How to name each example's group, and how to cut the groups.

    With ``mixed``, all examples are shuffled together and cut as one group.
    """

    group: Callable[[Sequence[Example]], list[str]]
    cut: Callable[[Terms], Slices]
    mixed: bool = False


def partition(
    examples: Sequence[Example],
    *,
    clients: int,
    kind: str,
    alpha: float,
    skew: float,
    held_out_share: float = 0.2,
    seed: int,
) -> list[Part]:
    """Return one part for each client; every example is in exactly one place.

    An example's group is its category where all examples have one, else its cluster. Kinds:
    ``iid`` deals out a seeded shuffle. ``category`` sorts the examples by group, cuts the line
    into two contiguous shards a client and gives the shards away by chance. ``cluster`` does the
    same with clusters, whether or not there are categories. ``dirichlet`` draws each group's
    shares over the clients from Dirichlet(alpha).

    Where the examples carry a ``split``, it is obeyed, and both splits are cut by the same
    shares; where none does, a part of each client's examples is held out, spread over its groups.
    A draw that leaves a client without training or held-out examples is repeated, at most
    ``MAX_DRAWS`` draws in all: at small alphas the shares are conditioned on nobody being empty.

    Args:
        examples: The data set's examples.
        clients: How many clients, >= 1.
        kind: A name in ``PARTITIONS``.
        alpha: Concentration for ``dirichlet``, > 0 and finite: small means that a group sits
            with few clients, large that every client has the mixture of the whole.
        skew: Exponent of the sizes, >= 0 and finite. Clients are ranked by chance; the one of
            rank i, from 0, has a target size proportional to ``(i + 1)**-skew``: 0 means equal
            sizes. For ``dirichlet``, whose sizes follow from alpha, these weights multiply each
            group's drawn shares.
        held_out_share: Share of a client's examples to hold out where no example carries a
            ``split``, in (0, 1); at least 1 example is held out and at least 1 is trained on.
        seed: The same seed gives the same parts.

    Raises:
        InputError: If an argument is out of its range, the examples are too few, only some of
            them carry a split or (for ``category``) a category, or every draw left a client
            empty.
        MissingExtraError: If clusters are needed and scikit-learn is not installed.
    """
    rule = PARTITIONS[choose("partition", kind, PARTITIONS)]
    _check(clients, alpha, skew, held_out_share)
    splits = _splits(examples, clients)
    groups = rule.group(examples)
    strata = [""] * len(examples) if rule.mixed else groups
    sizes = dict(sorted(Counter(strata).items()))
    for draw in range(MAX_DRAWS):
        rng = seeds.stream(seed, "partition", kind, draw)
        weights = _weights(clients, skew, rng)
        slices = rule.cut(Terms(sizes=sizes, weights=weights, alpha=alpha, rng=rng))
        hands = [_deal(indices, strata, slices, clients, rng) for indices in splits]
        if len(hands) == 1:
            pairs = [_hold_out(hand, groups, held_out_share) for hand in hands[0]]
        else:
            pairs = list(zip(hands[0], hands[1], strict=True))
        if all(train and held_out for train, held_out in pairs):
            return [_part(train, held_out, groups) for train, held_out in pairs]
    empty = next(i for i, pair in enumerate(pairs) if not all(pair))
    remedy = "a larger alpha, " * (kind == "dirichlet") + "a smaller skew, " * (skew > 0)
    raise InputError(
        f"partition '{kind}' with alpha {alpha:g} and skew {skew:g} leaves a client without "
        f"training or held-out examples in each of {MAX_DRAWS} draws (in the last one, client "
        f"{empty + 1} of {clients}); use fewer clients, {remedy}or more data"
    )


def categories(examples: Sequence[Example]) -> list[str]:
    """Return the category of each example.

    Raises:
        InputError: If an example has none.
    """
    named = [example.category for example in examples if example.category]
    if len(named) < len(examples):
        raise InputError(
            f"partition 'category' needs a category on every row, and "
            f"{len(examples) - len(named)} of {len(examples)} rows lack one; "
            "add it, or use the partition 'cluster'"
        )
    return named


def clusters(examples: Sequence[Example]) -> list[str]:
    """Return the cluster of each example: ``cluster-0`` is the largest, then ``cluster-1``, ...

    k-means on the TF-IDF of instruction, input and output, with a fixed seed and on one thread:
    a data set has one clustering, whatever the run's seed and the machine's cores.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import TfidfVectorizer
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError as err:
        raise MissingExtraError(
            "clusters are found by scikit-learn, which is not installed: "
            "`pip install 'pwff[edge]'`, or give every row a category"
        ) from err
    word = r"\w+|[^\w\s]+"  # punctuation too, so that no data set is without any word
    vectors = TfidfVectorizer(token_pattern=word, sublinear_tf=True, max_features=_VOCABULARY)
    means = KMeans(
        n_clusters=max(1, min(MAX_CLUSTERS, len(examples) // 2)),
        n_init=3,
        random_state=seeds.number(0, "clusters") % 2**32,
    )
    texts = [f"{example.instruction} {example.input} {example.output}" for example in examples]
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer distinct texts than clusters give that many clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = means.fit_predict(vectors.fit_transform(texts)).tolist()
    names = {label: f"cluster-{i}" for i, (label, _) in enumerate(Counter(labels).most_common())}
    return [names[label] for label in labels]


def _categories_or_clusters(examples: Sequence[Example]) -> list[str]:
    known = all(example.category for example in examples)
    return categories(examples) if known else clusters(examples)


def _proportional(terms: Terms) -> Slices:
    return {name: (np.arange(len(terms.weights)), terms.weights) for name in terms.sizes}


def _shards(terms: Terms) -> Slices:
    """Lay the groups end to end on a line, cut it into shards and shuffle who owns which."""
    owners = terms.rng.permutation(np.repeat(np.arange(len(terms.weights)), SHARDS_A_CLIENT))
    group_ends = np.cumsum(list(terms.sizes.values()), dtype=np.float64)
    shard_ends = np.cumsum(terms.weights[owners])
    group_ends /= group_ends[-1]
    shard_ends /= shard_ends[-1]
    ends = np.union1d(group_ends, shard_ends)
    lengths = np.diff(ends, prepend=0.0)
    # A slice lies in the first group and in the first shard that do not end before it does.
    inside = np.searchsorted(group_ends, ends)
    slice_owners = owners[np.searchsorted(shard_ends, ends)]
    return {
        name: (slice_owners[inside == i], lengths[inside == i])
        for i, name in enumerate(terms.sizes)
    }


def _dirichlet(terms: Terms) -> Slices:
    count = len(terms.weights)
    slices: Slices = {}
    for name in terms.sizes:
        shares = terms.rng.dirichlet(np.full(count, min(terms.alpha, _EVEN_ALPHA)))
        # In random order: rounding in small groups must not favour the same clients each time.
        order = terms.rng.permutation(count)
        slices[name] = (order, (shares * terms.weights)[order])
    return slices


PARTITIONS: dict[str, Rule] = {
    "iid": Rule(group=_categories_or_clusters, cut=_proportional, mixed=True),
    "category": Rule(group=categories, cut=_shards),
    "cluster": Rule(group=clusters, cut=_shards),
    "dirichlet": Rule(group=_categories_or_clusters, cut=_dirichlet),
}


def _weights(clients: int, skew: float, rng: np.random.Generator) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.power(rng.permutation(clients) + 1.0, -skew)
    return weights.clip(_LEAST_WEIGHT)


def _deal(
    indices: Sequence[int],
    strata: Sequence[str],
    slices: Slices,
    clients: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Return each client's share of ``indices``: each stratum shuffled, cut where slices end."""
    pools: dict[str, list[int]] = {}
    for index in indices:
        pools.setdefault(strata[index], []).append(index)
    hands: list[list[int]] = [[] for _ in range(clients)]
    for name, pool in pools.items():
        owners, lengths = slices[name]
        # The ends are rounded, not the lengths: nothing is lost, no slice is off by 1 or more.
        ends = np.floor(np.cumsum(lengths) / lengths.sum() * len(pool) + 0.5).astype(int)
        cards = np.split(rng.permutation(pool), ends[:-1])
        for owner, card in zip(owners, cards, strict=True):
            hands[owner].extend(card.tolist())
    return hands


def _hold_out(hand: list[int], groups: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Return (train, held out), taken at equal distances from the hand sorted by group."""
    count = min(max(1, round(share * len(hand))), max(0, len(hand) - 1))
    ordered = sorted(hand, key=lambda index: groups[index])
    held_out = [ordered[(2 * i + 1) * len(hand) // (2 * count)] for i in range(count)]
    return sorted(set(hand).difference(held_out)), held_out


def _part(train: Sequence[int], held_out: Sequence[int], groups: Sequence[str]) -> Part:
    counts = Counter(groups[index] for index in (*train, *held_out))
    if len(counts) > MAX_GROUPS:
        largest = dict(counts.most_common(MAX_GROUPS - 1))
        counts = Counter({**largest, OTHER: counts.total() - sum(largest.values())})
    return Part(
        train=tuple(sorted(train)),
        held_out=tuple(sorted(held_out)),
        groups=dict(sorted(counts.items())),
    )


def _splits(examples: Sequence[Example], clients: int) -> list[list[int]]:
    """Return the indices marked [train, held_out], or one list of all where none is marked."""
    marked = sum(example.split is not None for example in examples)
    if 0 < marked < len(examples):
        raise InputError(
            f"{len(examples) - marked} of {len(examples)} rows carry no split and the others do; "
            "mark every row 'train' or 'held_out', or none"
        )
    needed = clients if marked else 2 * clients
    splits = []
    for name in ("train", "held_out") if marked else (None,):
        indices = [i for i, example in enumerate(examples) if example.split == name]
        if len(indices) < needed:
            raise InputError(
                f"{clients} clients need at least {needed} "
                f"examples{f' marked {name}' if name else ''}, and the data has {len(indices)}; "
                "use fewer clients or more data"
            )
        splits.append(indices)
    return splits


def _check(clients: int, alpha: float, skew: float, held_out_share: float) -> None:
    for field, value, inside, bound in (
        ("clients", clients, clients >= 1, "at least 1"),
        ("alpha", alpha, 0 < alpha < math.inf, "above 0 and finite (0.5, for example)"),
        ("skew", skew, 0 <= skew < math.inf, "at least 0 and finite (0: equal sizes)"),
        ("held_out_share", held_out_share, 0 < held_out_share < 1, "between 0 and 1 (0.2, say)"),
    ):
        if not inside:
            raise InputError(f"{field} = {value} is out of range; it must be {bound}")
