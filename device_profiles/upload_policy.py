"""Waiting for good blocks: sending an update only where the channel is strong, within a deadline.

SI units: bits, seconds, watts, joules. In a strong block more bits pass for the same power, so a
sender that can wait radiates for less time. It knows the gain of a block before it sends, as every
sender at an adaptive rate does. Waiting is not free where the radio's electronics take power: what
they take is counted on both sides of the comparison. The saving can be negative, for that reason or
because the blocks in which it had to hurry were worse than those that it passed by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from device_profiles.blocks import MOST_BLOCKS, check_bits
from device_profiles.channel import BLOCKS_A_DRAW, given_up, gives_up
from device_profiles.closed_forms import ergodic_rate, rate_moments
from device_profiles.errors import InputError
from device_profiles.fading import Floats, draw_gains
from device_profiles.link import Link
from device_profiles.rates import adaptive_rates, draw_snr

SAFETY = 3.0  # standard deviations of the time that sending in every block takes

_HIGHEST_GAIN = 50.0
_PRECISION = 1e-4


@dataclass(frozen=True, kw_only=True)
class SentUpload:
    """One way of sending an update over given blocks.

    Attributes:
        seconds: From the first block until the bits are through.
        air_seconds: Of these, how long it radiated.
        transmit_joules: Radiated.
        circuit_joules: Taken by the electronics while the radio was on, waiting included.
    """

    seconds: float
    air_seconds: float
    transmit_joules: float
    circuit_joules: float

    @property
    def joules(self) -> float:
        """Energy of both kinds."""
        return self.transmit_joules + self.circuit_joules


@dataclass(frozen=True, kw_only=True)
class PatientUpload:
    """An update sent in good blocks, and the same one sent at once over the same blocks.

    Attributes:
        least_gain: The threshold; 0 where every block was needed from the start.
        hurried_after: Seconds after which it sent in every block; none if it never had to.
        sent: What it took.
        at_once: What sending in every block from the first on would have taken.
        late: Whether it ended after the deadline.
    """

    least_gain: float
    hurried_after: float | None
    sent: SentUpload
    at_once: SentUpload
    late: bool

    @property
    def joules_saved(self) -> float:
        """Energy at once less the energy that it took; negative if waiting cost more."""
        return self.at_once.joules - self.sent.joules


def patient_upload(
    bits: float,
    link: Link,
    deadline_seconds: float,
    generator: np.random.Generator,
    circuit_watts: float = 0.0,
) -> PatientUpload:
    """Return what sending ``bits`` >= 0 in good blocks takes.

    It sends where the gain is at least ``least_gain``: the highest threshold whose expected end
    meets the deadline. From the block on where the time left is no more than sending in every block
    may need (its mean and ``SAFETY`` standard deviations), it sends in every block. A deadline that
    cannot be met is an outcome, ``late``: every block is used, and the upload goes on to its end,
    or until the sender gives up (``device_profiles/channel.py``).

    Args:
        bits: Of the update.
        link: Of scheme ``adaptive``.
        deadline_seconds: > 0, from the first block on.
        generator: At the start of the upload's stream; draws what ``channel.upload`` would.
        circuit_watts: Of the radio's electronics while it is on, >= 0.

    Raises:
        InputError: If an argument is out of its range or scheme, or upload or deadline spans over
            ``MOST_BLOCKS`` blocks.
    """
    _check(link, deadline_seconds, circuit_watts)
    if check_bits(bits) == 0:
        nothing = SentUpload(seconds=0.0, air_seconds=0.0, transmit_joules=0.0, circuit_joules=0.0)
        return PatientUpload(
            least_gain=0.0, hurried_after=None, sent=nothing, at_once=nothing, late=False
        )
    snr = draw_snr(link, generator)
    if gives_up(bits, link, snr):
        return _given_up(link, circuit_watts)
    blocks = _Blocks(bits, link, snr, generator)
    least = _least_gain(bits, link, snr, deadline_seconds)
    good = np.where(blocks.gains(math.ceil(deadline_seconds / blocks.length)) >= least, 1.0, 0.0)
    hurry = _hurry(bits, blocks, good, deadline_seconds)
    sent = blocks.send(good[:hurry], circuit_watts)
    return PatientUpload(
        least_gain=0.0 if hurry == 0 else least,
        hurried_after=None if hurry is None else hurry * blocks.length,
        sent=sent,
        at_once=blocks.send(np.ones(0), circuit_watts),
        late=sent.seconds > deadline_seconds,
    )


class _Blocks:
    """The blocks that an upload may use, drawn as far as they are needed."""

    def __init__(self, bits: float, link: Link, snr: float, generator: np.random.Generator) -> None:
        self.length = link.coherence_seconds
        moments = rate_moments(snr, link.gain_k)
        self.mean_bits = moments.mean * link.band_hz * link.share.time * self.length
        self.variance = moments.variance / moments.mean**2  # of a block's bits over their mean
        self._bits, self._link, self._snr, self._generator = bits, link, snr, generator
        self._gains = np.ones(0)

    def gains(self, count: int) -> Floats:
        """Return the gains of the first ``count`` blocks. Shape (count,)."""
        while self._gains.size < count:
            more = draw_gains(self._link.gain_k, BLOCKS_A_DRAW, self._generator)
            self._gains = np.concatenate((self._gains, more))
        return self._gains[:count]

    def bits(self, count: int) -> Floats:
        """Return what the first ``count`` blocks carry if used. Shape (count,)."""
        return adaptive_rates(self._link, self._snr, self.gains(count)) * self.length

    def send(self, used: Floats, circuit_watts: float) -> SentUpload:
        """Return what sending takes in the first blocks where ``used`` is 1, then in every one."""
        count = used.size
        while True:
            use = np.concatenate((used, np.ones(count - used.size)))
            carried = self.bits(count) * use
            through = np.cumsum(carried)
            if count and through[-1] >= self._bits:
                break
            count += BLOCKS_A_DRAW
        last = int(np.searchsorted(through, self._bits))
        before = float(through[last - 1]) if last else 0.0
        rest = (self._bits - before) / float(carried[last])
        time = self._link.share.time * self.length
        seconds = (last + rest) * self.length
        air = (float(use[:last].sum()) + rest) * time
        return SentUpload(
            seconds=seconds,
            air_seconds=air,
            transmit_joules=air * self._link.transmit_watts,
            circuit_joules=seconds * self._link.share.time * circuit_watts,
        )


def _given_up(link: Link, circuit_watts: float) -> PatientUpload:
    spent = given_up(link)
    sent = SentUpload(
        seconds=spent.seconds,
        air_seconds=spent.air_seconds,
        transmit_joules=spent.transmit_joules,
        circuit_joules=spent.radio_seconds * circuit_watts,
    )
    return PatientUpload(least_gain=0.0, hurried_after=0.0, sent=sent, at_once=sent, late=True)


def _hurry(bits: float, blocks: _Blocks, good: Floats, deadline_seconds: float) -> int | None:
    """Return the first block before which what is left may need all the time left, if any."""
    sent = np.concatenate(([0.0], np.cumsum(blocks.bits(good.size) * good)))[:-1]
    need = np.maximum(bits - sent, 0.0) / blocks.mean_bits
    need = need + SAFETY * np.sqrt(need * blocks.variance) + 1
    left = deadline_seconds / blocks.length - np.arange(good.size)
    tight = np.flatnonzero((need >= left) & (sent < bits))
    return int(tight[0]) if tight.size else None


def _least_gain(bits: float, link: Link, snr: float, deadline_seconds: float) -> float:
    """Return the highest gain above which the mean rate still makes the deadline, or 0."""
    needed = bits / (deadline_seconds * link.band_hz * link.share.time)
    low, high = 0.0, _HIGHEST_GAIN
    while high - low > _PRECISION * high and high > _PRECISION:
        middle = (low + high) / 2
        fast_enough = ergodic_rate(snr, link.gain_k, above=middle) >= needed
        low, high = (middle, high) if fast_enough else (low, middle)
    return low


def _check(link: Link, deadline_seconds: float, circuit_watts: float) -> None:
    if link.scheme != "adaptive":
        raise InputError(f"scheme '{link.scheme}' does not wait for good blocks; use 'adaptive'")
    if not (math.isfinite(deadline_seconds) and deadline_seconds > 0):
        raise InputError(f"deadline_seconds = {deadline_seconds}; give a time above 0")
    if deadline_seconds > MOST_BLOCKS * link.coherence_seconds:
        raise InputError(
            f"deadline_seconds = {deadline_seconds:g} spans over {MOST_BLOCKS:,} coherence blocks "
            f"of coherence_seconds = {link.coherence_seconds:g}; give less of the one"
        )
    if not (math.isfinite(circuit_watts) and circuit_watts >= 0):
        raise InputError(f"circuit_watts = {circuit_watts}; give 0 or more")
