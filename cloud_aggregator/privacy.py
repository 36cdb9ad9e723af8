"""Client-level differential privacy: what the global states may tell of any one device.

Each update is shortened to a Euclidean norm of C over its whole packed vector, counts the same,
and their sum is divided by a fixed number n of expected clients; a Gaussian of standard deviation
sigma C / n is added to every one of the P entries, also to those that nobody held, and also in a
round in which nobody's update was accepted. (McMahan et al. 2018, with the fixed denominator.)

What is protected. Two runs are neighbours if they differ in whether one device's updates count, in
all rounds of all stages together: it moves a round's sum by at most C, so each round is a Gaussian
mechanism of noise multiplier sigma, and epsilon at delta is that of all of them composed. (To
replace a device's updates by others moves the sum by up to 2 C: twice the sensitivity.) Protected
is a device towards whoever sees the global states and the models built on them. Not protected: it
is trusted that the aggregator forgets the updates, which it sees; who took part and what a device
says of itself besides (profile, modules, user's preference) is in the record; a personal model
that a user gives away is that user's.

Sampling amplifies privacy only if each device is drawn by itself with the same probability
(Poisson), and only towards those who do not learn who was drawn; a cohort of a fixed size, a quorum
that closes a round, and replacements are no such draw. Without that, ``sampling_rate`` is 1.

The noise is drawn in floating point, whose gaps can tell more than the real Gaussian would (Mironov
2012), and by Philox, a counter generator that is no cryptographic one, keyed with 128 bits.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from cloud_aggregator.aggregation.robust import clip
from device_profiles.errors import InputError
from device_profiles.seeds import stream
from messaging.layout import Vector
from messaging.protocol import Report

_FINEST_INTERVAL = 1e-4  # of the accountant's grid of privacy losses, nats
_MOST_INTERVALS = 1e6  # of that grid: it takes a few hundred megabytes beyond


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """How private a run is.

    Attributes:
        clip_norm: C, > 0.
        noise_multiplier: sigma, the noise's standard deviation over C, >= 0.01.
        delta: Probability that is left out of account, in (0, 1); well below 1 / devices.
        expected_clients: n, by which every sum is divided, >= 1.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    expected_clients: int

    def __post_init__(self) -> None:
        """Refuse values out of their range.

        Raises:
            InputError: Naming the field.
        """
        if not 0 < self.clip_norm < math.inf:
            raise InputError(f"privacy.clip_norm = {self.clip_norm}; give a number above 0")
        if not 0.01 <= self.noise_multiplier < math.inf:
            raise InputError(
                f"privacy.noise_multiplier = {self.noise_multiplier}; give 0.01 or more (about 1 "
                "protects), or leave [privacy] out"
            )
        if not 0 < self.delta < 1:
            raise InputError(
                f"privacy.delta = {self.delta}; give a number between 0 and 1, well below 1 / the "
                "number of devices"
            )
        if self.expected_clients < 1:
            raise InputError(
                f"privacy.expected_clients = {self.expected_clients}; give 1 or more, about as "
                "many as are accepted in a round"
            )


class PrivacyRecord(BaseModel):
    """The section ``privacy`` of ``run.json``: what the global states so far have spent.

    Attributes:
        rounds: That were released, of all stages, those that were taken back included.
        sampling_rate: Of a Poisson draw; 1 claims no amplification.
        epsilon: Of all of them together at ``delta``, nats, for whether one client takes part.
        repeatable_noise: Whether the noise follows from the run's seed, as in emulation: then it
            hides nothing from who knows the seed, and epsilon is what other noise would give.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str = "client"
    clip_norm: float
    noise_multiplier: float
    delta: float
    expected_clients: int
    sampling_rate: float = 1.0
    rounds: int = 0
    epsilon: float = 0.0
    repeatable_noise: bool


def private_mean(
    vector: Vector,
    updates: Iterable[tuple[Vector, int]],
    settings: PrivacySettings,
    rng: np.random.Generator,
) -> Vector:
    """Return the state plus the clipped updates' sum over n, with noise. Shape (P,).

    Args:
        vector: The global state that the updates were trained from. Shape (P,).
        updates: (first entries of a vector of P, examples) in client order, taken once, at most
            one of a client; none at all is a round that only adds noise. Examples are not used.
        settings: C, sigma and n.
        rng: From ``noise_generator``; not drawn from before, nor afterwards.

    Raises:
        ValueError: If an update is longer than P or not finite.
    """
    total = np.zeros(vector.size, np.float64)
    for update, _ in updates:
        if update.size > vector.size:
            raise ValueError(
                f"an update of {update.size} entries; at most {vector.size} are shared"
            )
        total[: update.size] += clip(update, settings.clip_norm)
    total += settings.noise_multiplier * settings.clip_norm * rng.standard_normal(vector.size)
    return (vector + total / settings.expected_clients).astype(np.float32)


def draw_noise_key() -> int:
    """Return 128 random bits of the operating system for one round's noise.

    It is drawn when a round's accepted set is closed, and kept with it until the round is in the
    record: an aggregator that is started again in between releases the same state, not a second one
    with other noise. It is a secret, and is erased with the round's updates.
    """
    return secrets.randbits(128)


def noise_generator(key: int) -> np.random.Generator:
    """Return the generator of one round's noise in deployment, of a key that was never used."""
    return np.random.Generator(np.random.Philox(key=key))


def emulated_noise(seed: int, number: int) -> np.random.Generator:
    """Return the generator of a round's noise in emulation: repeatable, so it protects nobody."""
    return stream(seed, "privacy", number)


def withheld(report: Report) -> Report:
    """Return a report without what devices of a private run keep to themselves.

    They do so by their own configuration; one that tells all the same is not listened to. Each
    field is chosen to stay.
    """
    return Report(
        run=report.run,
        client=report.client,
        session=report.session,
        stage=report.stage,
        round=report.round,
        phase=report.phase,
        examples=1,
        costs=report.costs,
    )


def epsilon(settings: PrivacySettings, rounds: int, sampling_rate: float = 1.0) -> float:
    """Return epsilon at ``delta`` of so many rounds, from above, nats.

    Privacy loss distributions (Google's dp-accounting), on a grid whose rounding only adds; rounds
    of all stages count alike, since C stands in noise and sensitivity both.

    Args:
        settings: sigma and delta.
        rounds: Released, >= 0.
        sampling_rate: With which each client is drawn by itself in each round, (0, 1].

    Raises:
        InputError: If an argument is out of its range, or the accountant is not installed.
    """
    if rounds < 0 or not 0 < sampling_rate <= 1:
        raise InputError(
            f"rounds = {rounds}, sampling_rate = {sampling_rate}; give 0 or more rounds and a rate "
            "above 0 and at most 1"
        )
    if rounds == 0:
        return 0.0
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError as err:
        raise InputError(
            f"[privacy] needs the accountant of dp-accounting ({err}); run: "
            "pip install 'pwff[privacy]'"
        ) from err
    # the Gaussian's privacy loss is normal of mean mu^2 / 2 and deviation mu
    mu = math.sqrt(rounds) / settings.noise_multiplier
    interval = max(_FINEST_INTERVAL, (mu**2 / 2 + 12 * mu) / _MOST_INTERVALS)
    accountant = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    each = GaussianDpEvent(settings.noise_multiplier)
    event = each if sampling_rate == 1 else PoissonSampledDpEvent(sampling_rate, each)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(settings.delta))


def privacy_record(
    settings: PrivacySettings,
    rounds: int,
    *,
    repeatable_noise: bool,
    sampling_rate: float = 1.0,
    earlier: PrivacyRecord | None = None,
) -> PrivacyRecord:
    """Return what a run has spent after so many rounds.

    Raises:
        InputError: If its earlier rounds were made under other settings: what they have spent
            cannot be told from these.
    """
    now = PrivacyRecord(
        **asdict(settings),
        sampling_rate=sampling_rate,
        rounds=rounds,
        epsilon=epsilon(settings, rounds, sampling_rate),
        repeatable_noise=repeatable_noise,
    )
    if earlier is not None and earlier.rounds:
        fixed = ("clip_norm", "noise_multiplier", "delta", "expected_clients", "sampling_rate")
        for field in fixed:
            was, is_now = getattr(earlier, field), getattr(now, field)
            if was != is_now:
                raise InputError(
                    f"privacy.{field} = {is_now}, and the run's {earlier.rounds} rounds were made "
                    f"with {was}; give it as it was, or start a new run"
                )
    return now
