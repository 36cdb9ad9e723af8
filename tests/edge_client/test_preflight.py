"""What will not fit is refused before it is loaded, by what the system and its groups leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import Experiment
from device_profiles.modules import BaseShape
from device_profiles.step_memory import StepMemory
from device_profiles.step_model import StepShape
from edge_client.preflight import (
    FreeMemory,
    NotEnoughDiskError,
    NotEnoughMemoryError,
    check_disk,
    check_memory,
    client_memory,
    encoder_memory,
    fleet_bytes,
    free_memory,
    kept_states,
    reward_memory,
    whole_memory,
    whole_states,
)
from messaging.protocol import Codec

GB = 10**9


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\n"}
MEMINFO_BYTES = 8_192_000_000


def test_without_groups_the_system_says_what_is_free(tmp_path: Path) -> None:
    free = free_memory(write(tmp_path, MEMINFO))
    assert (free.bytes, free.source) == (MEMINFO_BYTES, "says the system")


def test_the_tightest_group_above_the_process_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/runs/one\n",
            "sys/fs/cgroup/runs/one/memory.max": "max\n",
            "sys/fs/cgroup/runs/one/memory.current": "1000000000\n",
            "sys/fs/cgroup/runs/memory.max": "3000000000\n",
            "sys/fs/cgroup/runs/memory.current": "2500000000\n",
            "sys/fs/cgroup/runs/memory.stat": "anon 5\ninactive_file 100000000\n",
        },
    )
    free = free_memory(root)
    assert free.bytes == 600_000_000  # 3.0 - 2.5, and 0.1 that the group would let go of
    assert free.source == "by the limit of control group /runs"


def test_a_group_that_leaves_more_than_the_system_has_does_not_count(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "64000000000\n",
            "sys/fs/cgroup/memory.current": "5\n",
        },
    )
    assert free_memory(root).bytes == MEMINFO_BYTES


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/box\n1:cpuset:/y\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "2000000000\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1700000000\n",
            "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 50000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "9000000000\n",
        },
    )
    free = free_memory(root)
    assert (free.bytes, free.source) == (350_000_000, "by the limit of control group /box")


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "3000\n",
        },
    )
    assert free_memory(root).bytes == 0


def test_this_machine_says_something() -> None:
    assert free_memory().bytes > 0


def test_what_fits_passes_and_what_does_not_is_told_with_a_remedy() -> None:
    free = FreeMemory(bytes=2 * GB, source="says the system")
    check_memory(2 * GB, free, what="pwff client", remedies=["x"])
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_memory(
            2.5 * GB,
            free,
            what="pwff client",
            remedies=["take precision = 'nf4'", "give fewer --workers"],
        )
    assert str(caught.value) == (
        "pwff client would take 2.50 GB of memory (modelled), and 2.00 GB are free (says the "
        "system); take precision = 'nf4', or give fewer --workers"
    )
    assert caught.value.exit_code == 2


def a_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(
        "edge_client.preflight.shutil.disk_usage", lambda _: SimpleNamespace(free=free)
    )


def test_what_the_disk_will_not_take_is_told_and_what_is_there_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_disk(monkeypatch, 2 * GB)
    place = tmp_path / "not" / "there" / "yet"
    check_disk(2 * GB, place, what="states", remedies=["x"])
    with pytest.raises(NotEnoughDiskError) as caught:
        check_disk(2 * GB + 1_000_000, place, what="states", remedies=["fewer", "a larger disk"])
    assert str(caught.value) == (
        f"states would take 2.00 GB of disk (modelled), and 2.00 GB are free in {tmp_path}; "
        "fewer, or a larger disk"
    )
    assert caught.value.exit_code == 2
    there = {"run/clients/a/state-1.safetensors": "x" * 1_000_000, "run/log": "x" * 9_000_000}
    write(tmp_path, there)
    check_disk(2 * GB + 1_000_000, tmp_path / "run", what="states", remedies=["x"])


def test_a_run_that_the_disk_would_not_take_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_disk(monkeypatch, 10_000_000)
    with pytest.raises(NotEnoughDiskError, match=r"what 50 clients and 6 rounds keep .*--out"):
        emulate(Experiment(clients=50, partition="iid", transport="memory"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_states_are_predicted_as_a_run_keeps_them(codec: Codec, tmp_path: Path) -> None:
    experiment = Experiment(
        clients=1, partition="iid", transport="memory", rounds=3, local_steps=1, batch_size=1,
        max_length=64, lora_count=12, codec=codec,
    )  # fmt: skip
    record = emulate(experiment, tmp_path / "run")
    device = record.clients[0]
    there = sum(p.stat().st_size for p in (tmp_path / "run" / "clients").rglob("*.safetensors"))
    own = device.trainable_parameters - device.shared_parameters
    predicted = kept_states(device.trainable_parameters, own, lossy=codec != "fp32")
    assert predicted < there < 1.1 * predicted  # names beside the numbers


@pytest.mark.parametrize(
    ("parameters", "rewards", "lossy", "measured"),
    [
        (2_969_344, 2, False, 99_700_000),
        (2_969_344, 2, True, 240_300_000),
        (124_439_808, 1, False, 2_070_000_000),
    ],
)
def test_whole_reward_models_take_what_a_disk_held_of_them_and_up_to_a_fifth_more(
    parameters: int, rewards: int, lossy: bool, measured: int
) -> None:
    assert measured < whole_states(parameters, rewards, lossy=lossy) < 1.21 * measured


def test_workers_share_a_mapped_base_and_nothing_else() -> None:
    worker = StepMemory(base=100, state=5, before=4, kept=30, working=20, runtime=400, holes=10)
    assert fleet_bytes(worker, 1, "fp32") == fleet_bytes(worker, 1, "nf4") == 569
    assert fleet_bytes(worker, 3, "fp32") == 100 + 3 * 469
    assert fleet_bytes(worker, 3, "nf4") == 3 * 569


SHAPE = StepShape(
    base=BaseShape(layers=12, width=768, inner=3072),
    heads=12,
    vocabulary=50_257,
    positions=1024,
    adapter_size=10,
    placement="qkv",
    lora_rank=96,
)


def test_a_client_takes_less_in_smaller_parts_or_at_a_lower_precision() -> None:
    def total(**changes: object) -> int:
        given = {"batch_size": 8, "max_length": 256, **changes}
        return client_memory(SHAPE, 24, **given).total  # type: ignore[arg-type]

    assert total(batch_size=1) < total(batch_size=6) < total()
    assert total(checkpoint=True) < total()
    assert total(max_length=128) < total()
    assert total(precision="nf4") < total(precision="int8") < total(precision="bf16") < total()
    # the base leaves memory and nothing else changes, but for room to unpack a part of it
    assert total() - total(precision="bf16") == pytest.approx(2 * 124e6, rel=0.1)


def test_a_client_of_few_examples_is_held_by_its_held_out_results() -> None:
    one = client_memory(SHAPE, 24, batch_size=1, max_length=256)
    eight = client_memory(SHAPE, 24, batch_size=8, max_length=256)
    assert one.kept == 0  # nothing is kept for a way back: sixteen examples go through at once
    assert eight.kept > 0


def test_learning_through_a_trunk_takes_no_more_than_a_usual_step_of_instruction_tuning() -> None:
    step = client_memory(SHAPE, 12, batch_size=4, max_length=256)
    learning = reward_memory(SHAPE, max_length=256, precision="fp32")
    assert learning.kept > 0  # the way back
    assert 0.8 * step.total < learning.total < step.total  # as many tokens, but no LoRA
    assert reward_memory(SHAPE, max_length=256, precision="int8").base < 0.3 * learning.base
    # one pair of two sides at the least, however long they are
    assert reward_memory(SHAPE, max_length=1024, precision="fp32").kept > learning.kept


def test_a_whole_trunk_takes_many_copies_of_its_weights_and_twice_the_way_back() -> None:
    weights = 124_439_808
    one, two = (whole_memory(SHAPE, weights, n, max_length=256) for n in (1, 2))
    assert two - one == 9 * 4 * weights
    frozen = reward_memory(SHAPE, max_length=256, precision="fp32")
    # the six of the reward model at hand, and what any process takes
    assert one - 15 * 4 * weights > 2 * frozen.kept
    assert one - 15 * 4 * weights < 3 * frozen.total - 2 * frozen.base


def test_an_encoder_takes_what_was_measured_of_minilm() -> None:
    assert encoder_memory(22_713_728, 384) == pytest.approx(480e6, rel=0.05)


def test_text_is_never_longer_than_the_base_allows() -> None:
    most = client_memory(SHAPE, 12, batch_size=1, max_length=1024)
    assert client_memory(SHAPE, 12, batch_size=1, max_length=5000) == most
