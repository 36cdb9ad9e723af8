"""A fleet as arrays: what a task takes each device, drawn for many devices at once.

SI units: seconds, joules, bits. N devices of the fleet, n of them asked. All of it is modelled:
training by ``device_profiles.round_estimate``, the uplink by ``device_profiles.many_uploads``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cloud_aggregator.simulation.settings import Simulation
from device_profiles.airtime import expected_upload
from device_profiles.availability import Places
from device_profiles.errors import InputError
from device_profiles.fading import Floats
from device_profiles.fleet import (
    Fleet,
    Kind,
    NamedDevice,
    _in_order,
    draw_fleet,
    find_fleet,
)
from device_profiles.link import PAPER_LINK, Link, profile_link
from device_profiles.many_uploads import upload_many
from device_profiles.normal_passage import LEAST_NORMAL_BLOCKS
from device_profiles.philox import Words, numbered_keys, uniforms
from device_profiles.planning import REFERENCE_BUDGET, REFERENCE_JOB, plan
from device_profiles.profile import Profile
from device_profiles.rates import adaptive_rates
from device_profiles.round_estimate import Job, RoundEstimate, round_estimate, upload_bits
from device_profiles.seeds import stream

TASK_PARTS = ("receive", "compute", "transmit", "circuit")

_FARTHEST = 3.0  # standard deviations of the SNR among devices
_FEW = 32  # keys that are made one by one


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """What devices of one kind have in common.

    Attributes:
        link: Of a device where the mean SNR is its kind's.
        estimate: Of a task, at the kind's own speed.
        bits_up: Of an update.
        bits_down: Of the global state.
    """

    profile: Profile
    link: Link
    estimate: RoundEstimate
    bits_up: float
    bits_down: float


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What tasks would take devices that stay to their end.

    Attributes:
        seconds: Downlink, training, uplink. Shape (n, 3).
        joules: In the order of ``TASK_PARTS``. Shape (n, 4).
        delivered: Whether the update arrives. Shape (n,).
    """

    seconds: Floats
    joules: Floats
    delivered: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


class Devices:
    """The fleet of a simulation.

    Raises:
        InputError: If the fleet is unknown, does not have so many devices, or cannot do the task.
    """

    def __init__(self, settings: Simulation) -> None:
        self.count, self._seed = settings.devices, settings.seed
        fleet = find_fleet(settings.fleet)
        members, self.kind = _members(fleet, settings.devices, settings.seed)
        job = replace(REFERENCE_JOB, local_steps=settings.local_steps)
        self.kinds = [_kind_of(member, settings.channel, job) for member in members]
        drawn = stream(settings.seed, "speed").standard_normal(self.count)
        self._slowness: Floats = np.exp(settings.speed_spread * drawn)
        drawn = stream(settings.seed, "place").standard_normal(self.count)
        drawn = np.clip(drawn, -_FARTHEST, _FARTHEST)
        self._offset_db: Floats = np.rint(settings.snr_spread_db * drawn)
        places = np.stack((self.kind, self._offset_db.astype(np.int64)), axis=1)
        groups, self._group = np.unique(places, axis=0, return_inverse=True)
        self._group = self._group.reshape(-1)
        self._links = [_moved(self.kinds[kind].link, float(db)) for kind, db in groups]
        self._group_kinds = groups[:, 0]
        self._expected = np.array(
            [
                expected_upload(self.kinds[kind].bits_up, link).seconds
                for kind, link in zip(self._group_kinds, self._links, strict=True)
            ]
        )
        self._radiated = np.array([k.profile.radio.circuit_watts for k in self.kinds])
        self._idle_watts = np.array([k.profile.compute.idle_watts for k in self.kinds])
        estimates = [k.estimate for k in self.kinds]
        self._down = np.array([(e.downlink_seconds, e.downlink_joules) for e in estimates])
        self._compute = np.array([(e.compute_seconds, e.compute_joules) for e in estimates])
        self.bits_up = np.array([k.bits_up for k in self.kinds])
        self.bits_down = np.array([k.bits_down for k in self.kinds])

    @property
    def capacity_joules(self) -> Floats:
        """Of the batteries, infinite where there is none. Shape (N,)."""
        return np.array([k.profile.battery_joules or np.inf for k in self.kinds])[self.kind]

    def idle_watts(self, places: Places) -> Floats:
        """Return the power of waiting devices. Shape (n,)."""
        return np.asarray(self._idle_watts[self.kind[places]], dtype=np.float64)

    def expected_seconds(self, places: Places) -> Floats:
        """Return how long a task takes devices on average. Shape (n,)."""
        kind = self.kind[places]
        compute = self._slowness[places] * self._compute[kind, 0]
        return np.asarray(
            self._down[kind, 0] + compute + self._expected[self._group[places]], dtype=np.float64
        )

    def tasks(self, places: Places, number: int) -> Tasks:
        """Return what the tasks of asking number ``number`` would take. Places of shape (n,).

        The channel of an upload belongs to (seed, number, device).
        """
        kind = self.kind[places]
        seconds, joules = np.empty((places.size, 3)), np.empty((places.size, 4))
        seconds[:, 0], joules[:, 0] = self._down[kind].T
        seconds[:, 1], joules[:, 1] = (self._slowness[places, None] * self._compute[kind]).T
        delivered = np.ones(places.size, dtype=np.bool_)
        keys = self._keys("channel", number, places)
        order = np.argsort(self._group[places], kind="stable")
        groups, starts = np.unique(self._group[places][order], return_index=True)
        for group, rows in zip(groups, np.split(order, starts[1:]), strict=True):
            link, own = self._links[group], self._group_kinds[group]
            blocks = self._expected[group] / link.coherence_seconds
            method = "normal" if blocks > 2 * LEAST_NORMAL_BLOCKS else "exact"
            sent = upload_many(float(self.bits_up[own]), link, keys[rows], method)  # type: ignore[arg-type]
            seconds[rows, 2] = sent.seconds
            joules[rows, 2] = sent.transmit_joules
            joules[rows, 3] = sent.radio_seconds * self._radiated[own]
            delivered[rows] = sent.delivered
        return Tasks(seconds=seconds, joules=joules, delivered=delivered)

    def pilot_rates(self, places: Places, number: int) -> Floats:
        """Return the rate of one coherence block of each device's channel, bit/s. Shape (n,).

        Another block than those of the upload, which the fast law does not draw one by one.
        """
        gains = -np.log1p(-uniforms(self._keys("pilot", number, places)[:, 0]))  # Rayleigh
        rates = np.empty(places.size)
        kinds = self.kind[places]
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            link = self.kinds[kind].link
            snrs = link.snr * 10 ** (self._offset_db[places[rows]] / 10)
            rates[rows] = adaptive_rates(link, snrs, gains[rows])
        return rates

    def _keys(self, word: str, number: int, places: Places) -> Words:
        """Return the devices' keys among the streams of (seed, word, number). Shape (n, 2)."""
        if places.size <= _FEW:
            each = [numbered_keys(self._seed, word, number, count=1, first=int(p)) for p in places]
            return np.concatenate(each) if each else np.empty((0, 2), dtype=np.uint64)
        return numbered_keys(self._seed, word, number, count=int(places.max()) + 1)[places]


def _members(fleet: Fleet, devices: int, seed: int) -> tuple[Sequence[Kind], Places]:
    """Return the kinds of a fleet, and which of them each device is. Shape (N,)."""
    if fleet.size not in (None, devices):
        raise InputError(f"devices = {devices}, and the fleet has {fleet.size}; give that")
    if fleet.device:
        return fleet.device, np.arange(devices)
    number = {id(member): place for place, member in enumerate(fleet.member)}
    order = [number[id(member)] for member in _in_order(fleet, devices, seed)]
    return fleet.member, np.array(order, dtype=np.int64)


def _kind_of(kind: Kind, channel: str, job: Job) -> DeviceKind:
    """Return what a member of a fleet is, in the way of training that is planned for it."""
    one = NamedDevice(**{**kind.model_dump(exclude={"share", "count"}), "id": "device"})
    device = draw_fleet(Fleet(device=(one,)), 1, 0)[0]
    link = PAPER_LINK if channel == "paper" else profile_link(device.profile.radio)
    setting = plan(device.profile, job, REFERENCE_BUDGET, link).setting
    return DeviceKind(
        profile=device.profile,
        link=link,
        estimate=round_estimate(device.profile, job, link, device.lora_count, setting),
        bits_up=upload_bits(job.shape, setting.codec),
        bits_down=upload_bits(job.shape, "fp32"),
    )


def _moved(link: Link, offset_db: float) -> Link:
    """Return the link of a device where the mean SNR is so much higher."""
    return replace(link, snr_db=min(100.0, max(-100.0, link.snr_db + offset_db)))
