"""Many uploads over links that are alike: a million in seconds, each on a stream of its own.

SI units: bits, seconds, joules. What is guaranteed: an upload's figures are a function of its bits,
the link, its key and the method, and of nothing that is computed beside it. By ``exact`` they are,
bit for bit on one machine, what ``channel.upload`` returns for a generator at the start of that
key's stream. ``normal`` is another draw of nearly the same law, not an approximation of the same
upload.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from device_profiles.blocks import MOST_BLOCKS, check_bits
from device_profiles.channel import BLOCKS_A_DRAW, gives_up, upload
from device_profiles.closed_forms import rate_moments
from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.fading import Floats, gains_of_normals
from device_profiles.link import Link
from device_profiles.normal_passage import normal_seconds
from device_profiles.philox import KeyedGenerator, Words
from device_profiles.rates import adaptive_rates, draw_snr

Method = Literal["exact", "normal"]

METHODS = ("exact", "normal")

_CELLS = 2**16  # gains at a time: half a megabyte, so that every step finds them in the cache
_WIDEST = 2**18  # blocks of an upload: longer ones are walked one by one, in little memory


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """What each of n uploads took: the fields of ``channel.Upload`` as arrays. Shape (n,) each."""

    seconds: Floats
    air_seconds: Floats
    radio_seconds: Floats
    transmit_joules: Floats
    delivered: npt.NDArray[np.bool_]


def upload_seconds_many(
    bits: npt.ArrayLike, link: Link, keys: Words, method: Method = "exact"
) -> Floats:
    """Return the delay of each upload. Shape (n,); see ``upload_many``."""
    return upload_many(bits, link, keys, method).seconds


def upload_many(bits: npt.ArrayLike, link: Link, keys: Words, method: Method = "exact") -> Uploads:
    """Return what each of n uploads took.

    Args:
        bits: Of each upload, >= 0. Shape (n,), or one number for all.
        link: Of all of them.
        keys: Their streams (``philox.named_keys``, ``philox.numbered_keys``). Shape (n, 2).
        method: ``exact`` draws every coherence block. ``normal`` draws the time at which the sum of
            the blocks passes ``bits`` from a normal law, corrected for its skewness and for the
            last, partly used block; scheme ``adaptive`` and ``LEAST_NORMAL_BLOCKS`` only.

    Raises:
        InputError: See ``channel.upload``; or the method does not fit link or bits.
    """
    choose("method", method, METHODS)
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != np.uint64:
        raise InputError(f"keys of shape {keys.shape} and {keys.dtype}; give (n, 2) and uint64")
    each = np.broadcast_to(np.asarray(bits, dtype=np.float64), (len(keys),))
    for amount in each[~(np.isfinite(each) & (each >= 0))]:
        check_bits(float(amount))
    if link.scheme != "adaptive":
        if method == "normal":
            raise InputError(f"method 'normal' under scheme '{link.scheme}'; choose 'exact'")
        return _one_by_one(each, link, keys)
    seconds = np.zeros(len(keys))
    some = np.flatnonzero(each)
    if some.size:
        gives_up(float(each.max()), link, link.sending_snr())  # refuses a link too weak for any
    walk = _exact if method == "exact" else normal_seconds
    seconds[some] = walk(each[some], link, keys[some])
    delivered = np.isfinite(seconds)
    seconds[~delivered] = MOST_BLOCKS * link.coherence_seconds
    air = seconds * link.share.time
    return Uploads(
        seconds=seconds,
        air_seconds=air,
        radio_seconds=air,
        transmit_joules=air * link.transmit_watts,
        delivered=delivered,
    )


def _one_by_one(bits: Floats, link: Link, keys: Words) -> Uploads:
    streams = KeyedGenerator()
    each = [upload(float(b), link, streams.at(key)) for b, key in zip(bits, keys, strict=True)]
    return Uploads(
        seconds=np.array([one.seconds for one in each], dtype=np.float64),
        air_seconds=np.array([one.air_seconds for one in each], dtype=np.float64),
        radio_seconds=np.array([one.radio_seconds for one in each], dtype=np.float64),
        transmit_joules=np.array([one.transmit_joules for one in each], dtype=np.float64),
        delivered=np.array([one.delivered for one in each], dtype=np.bool_),
    )


def _exact(bits: Floats, link: Link, keys: Words) -> Floats:
    """Return the seconds of each upload, infinite where it gives up; all blocks are drawn.

    Those that turn out to need more blocks than were drawn are drawn again, further.
    """
    streams, room = KeyedGenerator(), _Room()
    snrs = np.full(len(bits), link.sending_snr())
    if link.shadowing_db:
        snrs[:] = [draw_snr(link, streams.at(key)) for key in keys]
    unfaded = adaptive_rates(link, snrs, np.ones(len(bits)))
    if link.gain_k == math.inf or bits.size == 0:
        return np.asarray(bits / unfaded, dtype=np.float64)
    hopeless = bits / (unfaded * link.coherence_seconds) > MOST_BLOCKS
    seconds = np.where(hopeless, np.inf, np.nan)
    widths = _widths(bits, link, snrs)
    todo = np.flatnonzero(~hopeless)
    while todo.size:
        todo = todo[np.argsort(widths[todo], kind="stable")]
        for rows in _batches(todo, widths):
            shape = (len(rows), int(widths[rows[-1]]))
            if shape[1] > _WIDEST:
                seconds[rows] = _one_by_one(bits[rows], link, keys[rows]).seconds
                continue
            gains = _draw(link, keys[rows], shape[1], streams, room)
            rates = adaptive_rates(link, snrs[rows, None], gains, out=gains)
            sums = room.of("sums", shape)
            seconds[rows] = _passage(rates, bits[rows], link.coherence_seconds, sums)
        todo = todo[np.isnan(seconds[todo])]
        widths[todo] *= 2
    return seconds


def _widths(bits: Floats, link: Link, snrs: Floats) -> npt.NDArray[np.int64]:
    """Return numbers of blocks within which nearly all uploads are through. Shape (n,)."""
    grid = np.geomspace(snrs.min(), snrs.max(), 65 if link.shadowing_db else 1)
    moments = [rate_moments(float(snr), link.gain_k) for snr in grid]
    mean = np.interp(snrs, grid, [m.mean for m in moments])
    spread = np.interp(snrs, grid, [math.sqrt(m.variance) for m in moments])
    blocks = bits / (link.band_hz * link.share.time * link.coherence_seconds * mean)
    likely = blocks + 4 * np.sqrt(blocks) * spread / mean + 8
    return np.asarray(np.minimum(likely, _WIDEST + 1), dtype=np.int64)


def _batches(
    rows: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield rows, sorted by width, so many at a time that they fill ``_CELLS`` at most."""
    start = 0
    while start < rows.size:
        end = start + max(1, _CELLS // int(widths[rows[start]]))
        end = start + max(1, _CELLS // int(widths[rows[min(end, rows.size) - 1]]))
        yield rows[start:end]
        start = end


class _Room:
    """Arrays that are used again: a fresh one costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._cells: dict[str, Floats] = {}

    def of(self, name: str, shape: tuple[int, int]) -> Floats:
        """Return the array of that name with what happens to be in it. Shape ``shape``."""
        size = shape[0] * shape[1]
        if self._cells.get(name, np.empty(0)).size < size:
            self._cells[name] = np.empty(max(size, _CELLS))
        return self._cells[name][:size].reshape(shape)


def _draw(link: Link, keys: Words, width: int, streams: KeyedGenerator, room: _Room) -> Floats:
    """Return the gains of uploads, drawn in the order of ``channel.upload``. Shape (n, width)."""
    k = link.gain_k
    numbers = room.of("draws", (len(keys), 2 * width if k else width))
    for key, row in zip(keys, numbers, strict=True):
        generator = streams.at(key)
        if link.shadowing_db:
            generator.standard_normal()  # the shadow comes first
        if k:
            generator.standard_normal(out=row)
        else:
            generator.standard_exponential(out=row)
    return gains_of_normals(numbers, k) if k else numbers


def _passage(rates: Floats, bits: Floats, coherence_seconds: float, sums: Floats) -> Floats:
    """Return when the blocks' bits reach ``bits``; nan where they do not. (n, width), (n,) -> (n,).

    The sums are taken in the order of ``channel.upload``, in ``sums`` of shape (n, width).
    """
    np.multiply(rates, coherence_seconds, out=sums)
    seconds, left, before = np.full(len(bits), np.nan), bits.copy(), 0.0
    for start in range(0, rates.shape[1], BLOCKS_A_DRAW):
        part = slice(start, start + BLOCKS_A_DRAW)
        through = np.cumsum(sums[:, part], axis=1, out=sums[:, part])
        ends = np.flatnonzero(through[:, -1] >= left)
        if ends.size:
            last = np.sum(through[ends] < left[ends, None], axis=1)
            carried = np.where(last > 0, through[ends, last - 1], 0.0)
            rest = (left[ends] - carried) / rates[ends, start + last]
            seconds[ends] = before + last * coherence_seconds + rest
        left -= through[:, -1]
        left[ends] = np.inf
        before += BLOCKS_A_DRAW * coherence_seconds
    return seconds
