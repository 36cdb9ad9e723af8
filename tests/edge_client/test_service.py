"""The client's configuration, and a device that takes part from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from device_profiles.errors import InputError
from device_profiles.fleet import lora_count_of
from device_profiles.methods import OBJECTIVES
from device_profiles.modules import initial_adapters
from device_profiles.profile import find_profile
from device_profiles.reward_heads import TrunkShape, head_tensors
from edge_client import service
from edge_client.data.instructions import kit_file
from edge_client.host import Host
from edge_client.preflight import NotEnoughDiskError
from edge_client.reward.judging import reward_layout
from edge_client.reward.reference import scoring
from edge_client.service import take_part
from edge_client.service_config import Client, load_client
from edge_client.state import StateStore
from messaging.chunks import Missing, chunk_count, make_chunk, parse_chunk
from messaging.codecs import BlobHeader, decode_blob, encode_blob
from messaging.errors import AddressError
from messaging.layout import Layout, joint_sha256
from messaging.memory import MemoryNetwork
from messaging.protocol import Channel, Grant, Hello, Manifest, Offer, Preference, StateRef, Want
from quantization.encoder_identity import identify_encoder
from quantization.errors import BaseModelError, HubUnavailableError
from quantization.identity import BaseIdentity, binding
from tests.edge_client.conftest import (
    ADAPTER_SIZE,
    EXAMPLES,
    WAIT_SECONDS,
    Cloud,
    a_task,
    adapter_layout,
)
from tests.edge_client.reward.encoders import write_encoder

NAME = "laptop-1"
#: What the plans of these devices say; it is held by the tests of planning.
PI = lora_count_of(find_profile("raspberry-pi-5-8gb"), None)
LAPTOP = lora_count_of(find_profile("laptop-x86-cpu"), None)


@pytest.fixture
def settings(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a configuration that works, with ten examples."""
    data = tmp_path / "rows.jsonl"
    rows = [{**e.model_dump(exclude_none=True), "category": "simple"} for e in 2 * EXAMPLES]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "run": "trial",
        "client": NAME,
        "broker": "mqtt://127.0.0.1:1883",
        "folder": str(tmp_path / "device"),
        "profile": "raspberry-pi-5-8gb",
        "data": str(data),
        "model": str(tiny_checkpoint),
        "adapter_size": 4,
        "chunk_bytes": 8192,
    }


@pytest.fixture
def write(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write the configuration with changes; a value of None takes a key out."""

    def write(**changes: Any) -> Path:
        values = {k: v for k, v in {**settings, **changes}.items() if v is not None}
        path = tmp_path / "client.toml"
        path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()))
        return path

    return write


class _Network(MemoryNetwork):
    """A network without a socket that has an address like the broker's."""

    address = "memory"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> _Network:
    """Return the network that the service finds at any address."""
    network = _Network()
    monkeypatch.setattr(service, "MqttNetwork", lambda _url, _access: network)
    return network


# -- the configuration -----------------------------------------------------------------------------


def test_what_is_not_given_has_its_default(write: Callable[..., Path]) -> None:
    client = load_client(write(model=None, adapter_size=None, chunk_bytes=None))
    assert client.model == "mini"
    assert (client.adapter_size, client.placement, client.method) == (10, "qkv", "pwff")
    assert (client.lora_count, client.lora_rank, client.threads) == (None, None, 1)
    assert (client.channel, client.chunk_bytes) == ("profile", 122_880)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_count": 11}, r"client\.toml: lora_count = 11; choose 12 to 36"),
        ({"lora_count": 37}, r"client\.toml: lora_count = 37; choose 12 to 36"),
        ({"lora_count": 0}, r"client\.toml: lora_count = 0; choose 12 to 36"),
        ({"lora_count": "many"}, r"client\.toml: lora_count = 'many'"),
        ({"run": None}, r"client\.toml: 'run' is missing; add it"),
        ({"run": "a/b"}, r"client\.toml: run = 'a/b'"),
        ({"client": "Laptop 1"}, r"client\.toml: client = 'Laptop 1'"),
        ({"lora_counts": 12}, r"unknown key 'lora_counts'; did you mean 'lora_count'"),
        ({"precision": "int5"}, r"client\.toml: precision = 'int5'"),
        ({"method": "pwf"}, r"unknown method 'pwf'; did you mean 'pwff'"),
        ({"adapter_size": 0}, r"client\.toml: adapter_size = 0"),
        ({"helpfulness": 1.5}, r"client\.toml: helpfulness = 1\.5"),
        ({"held_out_share": 1.0}, r"client\.toml: held_out_share = 1\.0"),
        ({"chunk_bytes": 1000}, r"client\.toml: chunk_bytes = 1000"),
        ({"threads": 0}, r"client\.toml: threads = 0"),
        ({"stages": "instruction,rewards"}, "unknown stage 'rewards' in stages"),
        ({"stages": "reward,instruction"}, "are not in their order"),
        ({"stages": "instruction,alignment"}, "put reward before it"),
        ({"method": "shepherd", "stages": "instruction,reward"}, "instruction-tuned alone"),
        ({"private": True, "others_data": "kit"}, "others_data = 'kit' with private = true"),
        ({"trunk_precision": "int5"}, r"client\.toml: trunk_precision = 'int5'"),
        ({"reward_shares": "trunk"}, r"client\.toml: reward_shares = 'trunk'"),
        (
            {"reward_trunk": "bert", "reward_shares": "adapters"},
            r"client\.toml: reward_shares = 'adapters' with reward_trunk = 'bert'",
        ),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_by_name(
    write: Callable[..., Path], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        load_client(write(**changes))


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.toml"):
        load_client(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"profile": "raspberry-pi-6"},
            InputError,
            "unknown device profile 'raspberry-pi-6'; did you mean 'raspberry-pi-5-8gb'",
        ),
        ({"profile": "mine.toml"}, InputError, r"cannot read mine\.toml"),
        ({"data": "nowhere.jsonl"}, InputError, r"data file nowhere\.jsonl: No such file"),
        ({"model": "/nowhere/base"}, BaseModelError, "model '/nowhere/base': no such folder"),
        ({"placement": "wild"}, InputError, "unknown LoRA placement 'wild'; did you mean 'wide'"),
        ({"adapter_size": 17}, InputError, "adapter size 17; choose 1 to 16"),
        ({"lora_rank": 17}, InputError, "LoRA rank 17; choose 1 to 16"),
        ({"lora_rank": 0}, InputError, "LoRA rank 0; choose 1 to 16"),
    ],
)
def test_what_the_configuration_names_must_be_there_and_fit(
    write: Callable[..., Path],
    network: _Network,
    changes: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    del network
    client = load_client(write(**changes))
    with pytest.raises(error, match=sentence) as raised:
        take_part(client, lambda _host: pytest.fail("it must not come so far"))
    assert getattr(raised.value, "exit_code", None) == 2


def test_an_address_that_is_none_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(AddressError, match="broker address 'http://cloud' is no MQTT address"):
        take_part(load_client(write(broker="http://cloud")), lambda _host: None)


def test_a_model_on_a_hub_that_is_not_there_is_a_failure_with_a_remedy(
    write: Callable[..., Path],
    network: _Network,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    del network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(HubUnavailableError, match="give a checkpoint folder or 'mini'"):
        take_part(load_client(write(model="somebody/gpt2-of-theirs")), lambda _host: None)


# -- taking part -----------------------------------------------------------------------------------


@contextmanager
def taking_part(client: Client) -> Iterator[Future[list[str]]]:
    """Let a client take part for as long as the block lasts."""
    hosts: list[Host] = []
    started = threading.Event()

    def on_start(host: Host) -> None:
        hosts.append(host)
        started.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(take_part, client, on_start)
        try:
            yield future
        finally:
            if started.wait(WAIT_SECONDS):
                hosts[0].stop()


def a_manifest(identity: BaseIdentity, **changes: Any) -> Manifest:
    """Return the manifest of a run on the tiny base."""
    fields: dict[str, Any] = {
        "run": "trial",
        "session": "0" * 16,
        "method": "pwff",
        "stage": "instruction",
        "state": None,
        "binding": binding(identity, "qkv"),
        "layout": adapter_layout(identity).sha256,
    }
    return Manifest(**{**fields, **changes})


def test_a_device_says_what_its_profile_its_data_and_its_base_make_of_it(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity
) -> None:
    cloud = Cloud(network)
    with taking_part(load_client(write(helpfulness=0.3))) as result:
        hello = cloud.hear(Hello)
        cloud.say(NAME, a_task(NAME, work="stop"))
        assert result.result(WAIT_SECONDS) == []
    assert hello.binding == binding(identity, "qkv")
    assert hello.layout == adapter_layout(identity).sha256
    device = hello.device
    assert device is not None
    assert (device.id, device.profile, device.costs) == (NAME, "raspberry-pi-5-8gb", "measured")
    assert (device.lora_count, device.placement) == (PI, "qkv")
    assert (device.lora_rank, device.lora_rank_rule) == (2, "proportional")  # 96 * 16 / 768
    assert (device.adapter_count, device.adapter_size) == (36, 4)
    shared = 36 * (2 * 16 * 4 + 16 + 4)
    assert device.shared_parameters == shared
    assert device.trainable_parameters == shared + PI * 2 * (16 + 16)
    assert device.base_bytes == 4 * identity.parameters
    assert (device.examples, device.held_out_examples) == (8, 2)  # a fifth of ten is held out
    assert device.categories == {"simple": 10}
    assert device.preference == Preference(helpfulness=0.3, harmlessness=0.7)
    assert device.channel == Channel(
        snr_db=2.0,
        bandwidth_hz=1e6,
        transmit_watts=0.5,
        fading="rayleigh",
        coherence_seconds=0.01,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_count": 25}, {"lora_count": 25}),
        ({"lora_rank": 5}, {"lora_rank": 5, "lora_rank_rule": "given"}),
        ({"method": "local-only"}, {"shared_parameters": 0, "adapter_count": 36}),
        (  # 36 adapters of 2*16*4 + 16 + 4, and the device's modules of 2*(16 + 16)
            {"method": "vanilla-fl-own"},
            {"lora_count": PI, "shared_parameters": 36 * 148 + PI * 64},
        ),
        (
            {"method": "fedlora-own", "lora_count": 12},
            {"lora_count": 12, "adapter_count": 0, "shared_parameters": 12 * 64},
        ),
        (  # a baseline holds all modules, on a Pi as well
            {"method": "fedlora"},
            {"lora_count": 36, "adapter_count": 0, "shared_parameters": 36 * 64},
        ),
        (
            {"channel": "paper"},
            {
                "channel": Channel(
                    snr_db=5.0,
                    bandwidth_hz=1e6,
                    transmit_watts=1.0,
                    fading="rayleigh",
                    coherence_seconds=0.01,
                )
            },
        ),
        ({"profile": "laptop-x86-cpu"}, {"lora_count": LAPTOP}),
    ],
)
def test_a_device_is_what_its_configuration_says(
    write: Callable[..., Path],
    network: _Network,
    changes: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    cloud = Cloud(network)
    with taking_part(load_client(write(**changes))):
        device = cloud.hear(Hello).device
    assert device is not None
    assert {key: getattr(device, key) for key in expected} == expected


ALL_STAGES = "instruction,reward,alignment"


def kit_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of the kit."""
    return [json.loads(line) for line in kit_file(name).read_text("utf-8").splitlines()]


def test_a_device_with_preference_pairs_says_how_many_and_how_it_scores(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity
) -> None:
    cloud = Cloud(network)
    given = {"stages": ALL_STAGES, "helpfulness_data": "kit", "harmlessness_data": "kit"}
    with taking_part(load_client(write(**given, trunk_precision="fp32"))):
        hello = cloud.hear(Hello)
    device = hello.device
    assert device is not None
    rows = [r for n in OBJECTIVES for r in kit_rows(f"{n}_preferences.jsonl")]
    assert device.preference_pairs == sum(row["split"] == "train" for row in rows)
    reference = kit_file("reference_responses.jsonl").read_bytes()
    assert device.scoring == f"fp32:{hashlib.sha256(reference).hexdigest()}"
    adapters = adapter_layout(identity)
    heads = Layout.of(t for n in OBJECTIVES for t in head_tensors(n, identity.shape.width))
    assert hello.layout == joint_sha256([adapters, heads, adapters])


def test_a_device_whose_reward_models_read_an_encoder_says_which(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity, tmp_path: Path
) -> None:
    given = {"stages": ALL_STAGES, "helpfulness_data": "kit", "harmlessness_data": "kit"}
    encoder = identify_encoder(str(write_encoder(tmp_path / "bert")))
    assert encoder is not None
    cloud = Cloud(network)
    with taking_part(load_client(write(**given, reward_trunk=str(encoder.folder)))):
        hello = cloud.hear(Hello)
    adapters = adapter_layout(identity)
    heads = Layout.of(t for n in OBJECTIVES for t in head_tensors(n, encoder.width))
    assert hello.layout == joint_sha256([adapters, heads, adapters])
    assert hello.device is not None
    assert hello.device.scoring == scoring("int8", encoder.sha256)
    assert len({scoring("int8", encoder.sha256), scoring("int8", "f" * 64), scoring("int8")}) == 3


def test_a_device_whose_reward_models_have_adapters_is_not_in_a_run_whose_have_none(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity
) -> None:
    given = {"stages": ALL_STAGES, "helpfulness_data": "kit", "harmlessness_data": "kit"}
    adapters = adapter_layout(identity)

    def of_a_run(adapter_size: int) -> str:
        rewards = reward_layout(
            OBJECTIVES, TrunkShape(base=identity.shape, adapter_size=adapter_size)
        )
        return joint_sha256([adapters, rewards, adapters])

    cloud = Cloud(network)
    with taking_part(load_client(write(**given, reward_shares="adapters"))):
        assert cloud.hear(Hello).layout == of_a_run(ADAPTER_SIZE)
    cloud.post(a_manifest(identity, layout=of_a_run(0)))
    with taking_part(load_client(write(**given, reward_shares="adapters"))) as result:
        (reason,) = result.result(WAIT_SECONDS)
    assert "shares other tensors than this device" in reason
    assert "reward_shares" in reason


def test_a_device_of_instruction_tuning_alone_scores_nothing(
    write: Callable[..., Path], network: _Network
) -> None:
    cloud = Cloud(network)
    with taking_part(load_client(write(helpfulness_data="nowhere.jsonl"))):
        device = cloud.hear(Hello).device
    assert device is not None
    assert (device.preference_pairs, device.scoring) == (0, "")


def test_a_device_of_a_method_with_one_objective_needs_data_of_that_one(
    write: Callable[..., Path], network: _Network
) -> None:
    cloud = Cloud(network)
    given = {"method": "sfl", "stages": ALL_STAGES, "helpfulness_data": "kit"}
    with taking_part(load_client(write(**given))):
        device = cloud.hear(Hello).device
    assert device is not None
    helpful = kit_rows("helpfulness_preferences.jsonl")
    assert device.preference_pairs == sum(row["split"] == "train" for row in helpful)


@pytest.mark.parametrize("missing", OBJECTIVES)
def test_a_device_that_learns_rewards_without_data_of_an_objective_is_refused(
    write: Callable[..., Path], network: _Network, missing: str
) -> None:
    del network
    given = {f"{name}_data": "kit" for name in OBJECTIVES if name != missing}
    client = load_client(write(stages=ALL_STAGES, **given))
    sentence = (
        f"^{missing}_data is not given, and the run learns a reward model of {missing}; give "
        "'kit', a file of pairs .*or leave 'reward' and 'alignment' out of stages$"
    )
    with pytest.raises(InputError, match=sentence) as told:
        take_part(client, lambda _host: pytest.fail("it must not come so far"))
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"helpfulness_data": "nowhere.jsonl"}, r"nowhere\.jsonl: No such file.*'kit'"),
        ({"prompts": "nowhere.txt"}, r"nowhere\.txt: No such file"),
    ],
)
def test_preference_data_that_is_not_there_is_named(
    write: Callable[..., Path], network: _Network, changes: dict[str, str], sentence: str
) -> None:
    del network
    given = {"stages": ALL_STAGES, "helpfulness_data": "kit", "harmlessness_data": "kit"}
    with pytest.raises(InputError, match=sentence):
        take_part(
            load_client(write(**{**given, **changes})),
            lambda _host: pytest.fail("it must not come so far"),
        )


def test_a_device_trains_from_the_global_state_and_keeps_its_own_in_a_folder_for_the_run(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity, tmp_path: Path
) -> None:
    cloud, layout = Cloud(network), adapter_layout(identity)
    start = layout.pack(initial_adapters(identity.shape, 4, seed=7))
    header = BlobHeader(
        run="trial",
        round=0,
        sender="aggregator",
        codec="fp32",
        layout=layout.sha256,
        examples=0,
    )
    state = encode_blob(start, layout, header)
    ref = StateRef(
        round=0,
        blob=hashlib.sha256(state).hexdigest(),
        bytes=len(state),
        chunk_bytes=8192,
        chunks=chunk_count(len(state), 8192),
    )
    with taking_part(load_client(write())) as result:
        cloud.hear(Hello)
        cloud.say(NAME, a_task(NAME, state=ref))
        want = cloud.hear(Want)
        for index in Missing.from_bitmap(want.missing, ref.chunks).indices:
            cloud.send(NAME, make_chunk("trial", ref.blob, state, index, 8192))
        offer = cloud.hear(Offer)
        missing = Missing(offer.chunks).bitmap()
        cloud.say(
            NAME,
            Grant(
                run="trial",
                client=NAME,
                blob=offer.blob,
                missing=missing,
                window=8,
                expiry_seconds=30.0,
            ),
        )
        chunks = [parse_chunk("trial", cloud.hear_chunk()) for _ in range(offer.chunks)]
        cloud.say(NAME, a_task(NAME, work="stop"))
        assert result.result(WAIT_SECONDS) == []
    blob = b"".join(c.payload for c in sorted(chunks, key=lambda c: c.index))
    header, update = decode_blob(blob, layout)
    assert (header.sender, header.examples) == (NAME, 8)
    assert np.count_nonzero(update) == layout.size
    assert offer.costs.compute_seconds > 0
    kept = StateStore(tmp_path / "device" / "trial").load(1)
    assert len(kept.personal) == 2 * PI
    assert [p.name for p in (tmp_path / "device").iterdir()] == ["trial"]


def test_a_device_on_another_base_says_why_it_gave_up(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity
) -> None:
    Cloud(network).post(a_manifest(identity, binding=binding(identity, "wide")))
    with taking_part(load_client(write())) as result:
        (reason,) = result.result(WAIT_SECONDS)
    assert reason.startswith("laptop-1: the run is built on another base, tokenizer or LoRA")


def test_a_device_with_adapters_of_another_size_says_why_it_gave_up(
    write: Callable[..., Path], network: _Network, identity: BaseIdentity
) -> None:
    Cloud(network).post(a_manifest(identity))
    with taking_part(load_client(write(adapter_size=5))) as result:
        (reason,) = result.result(WAIT_SECONDS)
    assert "shares other tensors than this device" in reason


def test_whole_reward_models_that_the_disk_would_not_take_are_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def almost_full(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("edge_client.preflight.shutil.disk_usage", almost_full)
    pairs = {f"{name}_data": "kit" for name in OBJECTIVES}
    client = Client(
        **{
            **settings, **pairs, "stages": "instruction,reward,alignment", "reward_shares": "all",
            "trunk_precision": "fp32", "folder": tmp_path / "kept",
        }
    )  # fmt: skip
    # of another run of this device: its states are no room for those of this one
    other = tmp_path / "kept" / "other" / "state-000001.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(10_000_000))
    with pytest.raises(NotEnoughDiskError, match="device keeps of whole reward models would take"):
        take_part(client, lambda _host: None)
    assert asked == [tmp_path / "kept"]
    heads = client.model_copy(update={"reward_shares": "head", "broker": "mqtt://127.0.0.1:1"})
    take_part(heads, lambda host: host.stop())  # heads have no such states
