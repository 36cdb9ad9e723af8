"""Fifty runs in which brokers, aggregators and devices are killed at random, to the same bits.

    python benchmarks/chaos.py
    python benchmarks/chaos.py --first 17 --runs 1

Each run is one real mosquitto without persistence, one aggregator and eight devices, processes of
their own, over three rounds; the devices' lesson is arithmetic on what they are sent and what they
kept (``tests/faults``). Kills by SIGKILL are drawn from the run's number, one of each kind at
least, each when so many things have happened in all programs together. Whatever is killed is
started again at once. A run has survived if it ends by itself, if every update of every round
counted once, and if every global state has the bits of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_profiles.seeds import stream
from messaging.broker import is_installed
from tests.faults.broker import Mosquitto
from tests.faults.play import Play
from tests.faults.processes import Actor, ended

Kind = Literal["broker", "aggregator", "device"]
KINDS: tuple[Kind, ...] = ("broker", "aggregator", "device")
SETTINGS: dict[str, Any] = {"rounds": 3, "gather_seconds": 20.0}
END_SECONDS = 120.0  # a run that has not ended so long after its last kill never will


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: when so many things have happened, this."""

    after: int
    kind: Kind
    device: str


class Happenings:
    """How many things have happened, to be waited for."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait(self, count: int, over: Actor) -> bool:
        """Wait until so many things have happened; return whether they did before it was over."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._count >= count or over.count("ended") > 0, END_SECONDS
            )
            return self._count >= count and over.count("ended") == 0


def draw(seed: int, devices: tuple[str, ...], kills: int, things: int) -> list[Kill]:
    """Return the kills of a run, in their order: one of each kind at least."""
    drawn = stream(seed, "chaos")
    kinds = [*KINDS, *(KINDS[i] for i in drawn.integers(len(KINDS), size=kills - len(KINDS)))]
    places = sorted(int(place) for place in drawn.integers(1, things, size=kills))
    order = drawn.permutation(kills)
    return [
        Kill(after=at, kind=kinds[i], device=devices[int(drawn.integers(len(devices)))])
        for at, i in zip(places, order, strict=True)
    ]


def one_run(folder: Path, devices: tuple[str, ...], kills: list[Kill]) -> tuple[Play, list[Kill]]:
    """Do a run; return it, and the kills that it saw before it was over.

    Raises:
        AssertionError: If it does not end well.
    """
    broker = Mosquitto(folder)
    broker.start()
    happenings = Happenings()
    play = Play(folder, broker, devices, heard=happenings)
    done = []
    try:
        with ended(play.actors):
            cloud = play.cloud(**SETTINGS)
            running = play.others()
            for kill in kills:
                if not happenings.wait(kill.after, cloud):
                    break
                done.append(kill)
                if kill.kind == "broker":
                    broker.kill()
                    broker.start()
                elif kill.kind == "aggregator":
                    cloud.kill()
                    if cloud.count("ended"):
                        break
                    cloud = play.cloud(**SETTINGS)
                else:
                    running[kill.device].kill()
                    running[kill.device] = play.device(kill.device)
            play.finish(cloud, *running.values())
    finally:
        broker.kill()
    return play, done


def main() -> int:
    """Do the runs, print a line for each, and return 1 if one did not survive."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first", type=int, default=1, help="number of the first run")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--kills", type=int, default=6)
    arguments = parser.parse_args()
    if not is_installed("mosquitto"):
        print("mosquitto is not installed on this machine")
        return 2
    devices = tuple(f"pi-{number}" for number in range(1, arguments.devices + 1))
    with tempfile.TemporaryDirectory(prefix="pwff-chaos-") as folder:
        quiet, _ = one_run(Path(folder), devices, [])
        states, things = quiet.states, sum(len(actor.told) for actor in quiet.actors)
    print(f"undisturbed: {len(states) - 1} rounds, {things} things happen")
    survived, seconds, dealt = 0, [], dict.fromkeys(KINDS, 0)
    for seed in range(arguments.first, arguments.first + arguments.runs):
        began = time.monotonic()
        kills = draw(seed, devices, arguments.kills, things)
        with tempfile.TemporaryDirectory(prefix="pwff-chaos-") as folder:
            try:
                play, done = one_run(Path(folder), devices, kills)
                whole = play.accepted == [list(devices)] * (len(states) - 1)
                verdict = "same bits" if whole and play.states == states else "OTHER BITS"
            except AssertionError as err:
                done, verdict = kills, f"DID NOT END WELL: {err}"
        seconds.append(time.monotonic() - began)
        survived += verdict == "same bits"
        for kill in done:
            dealt[kill.kind] += 1
        said = " ".join(f"{k.kind if k.kind != 'device' else k.device}@{k.after}" for k in done)
        print(f"run {seed}: {verdict} in {seconds[-1]:.1f} s; killed {said}", flush=True)
    print(
        f"{survived} of {arguments.runs} runs of {len(devices)} devices x {len(states) - 1} rounds "
        f"ended with identical global tensors; killed "
        + ", ".join(f"{number} {kind}s" for kind, number in dealt.items())
        + f"; median {statistics.median(seconds):.1f} s a run"
    )
    return int(survived < arguments.runs)


if __name__ == "__main__":
    sys.exit(main())
