"""An embedded broker that dies ends the run soon, with a sentence, and loses nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from messaging.broker import embedded_kind
from tests.end_to_end.conftest import SMALL, await_line, is_nursery, pwff, read_run, start

pytestmark = pytest.mark.broker


def test_a_broker_that_dies_is_noticed_and_the_run_goes_on_with_another(tmp_path: Path) -> None:
    if embedded_kind() is None:
        pytest.skip("no MQTT broker is installed (mosquitto or iotcore)")
    out = tmp_path / "run"
    process = start("emulate", *SMALL, "--workers", "1", "--out", str(out))
    await_line(process, lambda line: line.startswith("round 1/2"))
    guards = [child for child in psutil.Process(process.pid).children() if not is_nursery(child)]
    (broker,) = [child for guard in guards for child in guard.children()]
    os.kill(broker.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)  # of an hour that the devices would be waited for
    assert process.returncode == 1, said
    assert "ended in the middle of the run" in said
    assert (read_run(out)["status"], len(read_run(out)["rounds"])) == ("failed", 1)
    again = pwff("emulate", "--resume", "--out", str(out))
    assert again.returncode == 0, again.stdout + again.stderr
    assert (read_run(out)["status"], len(read_run(out)["rounds"])) == ("done", 2)
