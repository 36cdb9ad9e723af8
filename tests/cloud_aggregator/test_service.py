"""The aggregator's configuration file, a run's folder of another run, and what it runs without."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from cloud_aggregator.database import StoreError
from cloud_aggregator.records import (
    DataRecord,
    EncoderRecord,
    ModelRecord,
    PricedRecord,
    model_record,
)
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.service import serve
from cloud_aggregator.service_config import Service, load_service
from cloud_aggregator.service_plan import claims_of
from cloud_aggregator.store import Store
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.pricing import CostBasis
from messaging.errors import AddressError
from quantization.identity import file_sha256, identify
from tests.cloud_aggregator.conftest import record_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "cloud.toml"

CONFIG = """\
run = "first-run"
broker = "mqtt://127.0.0.1:1883"
out = "runs/first-run"
clients = 2
minimum_clients = 2
method = "pwff"
rounds = 10
codec = "int8"
quorum = 0.8
deadline_seconds = 3600
"""


def write(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "cloud.toml"
    path.write_text(text)
    return path


def test_the_example_is_a_service() -> None:
    service = load_service(EXAMPLE)
    assert (service.method, service.clients, service.codec) == ("pwff", 2, "int8")
    assert service.grants * service.window < 1000  # what a default mosquitto queues


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    text = 'run = "r"\nbroker = "mqtt://127.0.0.1"\nout = "x"\nclients = 3\n'
    service = load_service(write(tmp_path, text))
    assert service == Service(run="r", broker="mqtt://127.0.0.1", out=Path("x"), clients=3)
    assert service.minimum_clients == 1


def test_a_store_for_large_updates_and_a_chunk_profile_are_read(tmp_path: Path) -> None:
    text = f'{CONFIG}chunk_bytes = "small"\nclaim_store = "file://{tmp_path}"\n'
    service = load_service(write(tmp_path, text))
    claims = claims_of(service)
    assert service.chunk_bytes == 61_440
    assert claims is not None
    assert (claims.store.base, claims.above_bytes) == (f"file://{tmp_path}", 8_388_608)
    assert claims_of(load_service(write(tmp_path))) is None


def test_a_store_of_no_known_kind_ends_the_service_before_it_begins(tmp_path: Path) -> None:
    service = load_service(write(tmp_path, f'{CONFIG}claim_store = "ftp://host/x"\n'))
    with pytest.raises(AddressError, match="claim_store 'ftp://host/x' is of no known kind"):
        claims_of(service)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("codec =", "codek =", "unknown key 'codek'; did you mean 'codec'?"),
        ("clients = 2\nmin", "min", "'clients' is missing; add it"),
        ('broker = "mqtt://127.0.0.1:1883"\n', "", "'broker' is missing"),
        ('"pwff"', '"pwf"', "unknown method 'pwf'; did you mean 'pwff'?"),
        ('"int8"', '"int5"', "codec = 'int5'"),
        ('"first-run"\nbroker', '"First Run"\nbroker', "run = 'First Run'"),
        ('"first-run"\nbroker', '"a/+/b"\nbroker', "run = 'a/+/b'"),
        ("clients = 2\nminimum_clients = 2", "clients = 0", "clients = 0"),
        ("minimum_clients = 2", "minimum_clients = 3", "minimum_clients = 3 is above clients = 2"),
        ("rounds = 10", "rounds = 0", "rounds = 0"),
        ("rounds = 10", "rounds = ", "is no valid TOML"),
        ("0.8", "1.5", "quorum = 1.5"),
        ("0.8", "nan", "quorum = nan"),
        ("3600", "inf", "deadline_seconds = inf"),
        ("3600", "0", "deadline_seconds = 0"),
        ("3600", '3600\nplacement = "all"', "unknown LoRA placement 'all'"),
        ("3600", "3600\nlearning_rate = 0", "learning_rate = 0"),
        ("3600", "3600\nchunk_bytes = 1000", "chunk_bytes = 1000"),
        ("3600", '3600\nreward_shares = "trunk"', "reward_shares = 'trunk'"),
        (
            "3600",
            '3600\nreward_trunk = "bert"\nreward_shares = "adapters"',
            "only the base changes",
        ),
        ("3600", "3600\ngrants = 64", "grants = 64 uploads of window = 16"),
        ("3600", "3600\nbroker_queue = 100", "the broker queues 100 messages"),
        ("3600", '3600\nchunk_bytes = "tiny"', "unknown chunk profile 'tiny'; choose one of"),
        ("3600", "3600\nclaim_above_bytes = -1", "claim_above_bytes = -1"),
        (
            "3600",
            '3600\nstages = "instruction,reward,alignment"\n'
            "max_length = 64\n[alignment.settings]\nmax_new_tokens = 63",
            "max_new_tokens = 63 leaves no room for a prompt in max_length = 64",
        ),
    ],
)
def test_a_mistake_is_told_with_file_key_and_remedy(
    old: str, new: str, words: str, tmp_path: Path
) -> None:
    assert CONFIG.count(old) == 1
    path = write(tmp_path, CONFIG.replace(old, new))
    with pytest.raises(InputError) as told:
        load_service(path)
    assert words in str(told.value)
    if "unknown method" not in words and "placement" not in words:
        assert str(path) in str(told.value)


def test_a_configuration_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_service(tmp_path / "nowhere.toml")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a GPT-2 of two blocks and width 8, with weights that nobody computes with."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"wte.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}
    head = json.dumps(weights).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(128))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def a_service(checkpoint: Path, **changes: object) -> Service:
    fields: dict[str, object] = {
        "run": "trial",
        "broker": "mqtt://user:secret@127.0.0.1:9",
        "out": checkpoint.parent / "run",
        "clients": 1,
        "model": str(checkpoint),
        "adapter_size": 4,
    }
    return Service.model_validate({**fields, **changes})


def refused(service: Service) -> str:
    """Serve what must be refused before it begins; return the sentence."""
    with pytest.raises(InputError) as told:
        serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    return str(told.value)


def test_a_folder_with_another_run_is_not_gone_on_with(checkpoint: Path) -> None:
    model = ModelRecord(
        name="base",
        parameters=32,
        layers=2,
        width=8,
        sha256=file_sha256(checkpoint / "model.safetensors"),
        tokenizer_sha256="c" * 64,
    )
    encoder = EncoderRecord(name="bert", parameters=8, width=8, sha256="e" * 64)
    folder = RunFolder(checkpoint.parent / "run")
    for name, changes in (
        ("seed", {"seed": 8}),
        ("run", {"run": "other"}),
        ("method", {"method": "fedada"}),
        ("codec", {"codec": "int8"}),
        ("reward_shares", {"reward_shares": "adapters"}),
        ("reward_trunk", {"encoder": encoder}),
        ("base", {"model": model.model_copy(update={"sha256": "0" * 64})}),
    ):
        kept = record_of(**{"model": model, "seed": 7, **changes})
        folder.write_record(kept)
        before = folder.record_path.read_bytes()
        said = refused(a_service(checkpoint, seed=7))
        assert f"{folder.path} holds a run whose {name} is" in said
        assert "another 'out'" in said
        assert folder.record_path.read_bytes() == before


def test_a_service_that_is_stopped_before_it_begins_has_written_down_what_it_is(
    checkpoint: Path,
) -> None:
    """Nobody is connected to: the run is stopped in the phase in which it waits for devices."""
    service = a_service(checkpoint)
    record = serve(
        service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop()
    )
    assert (record.status, record.stop_reason) == ("stopped", "interrupted")
    assert record.data == DataRecord(source="the clients' own", examples=0)
    assert (record.model.layers, record.model.parameters) == (2, 32)
    config = (service.out / "config.toml").read_text()
    assert "127.0.0.1:9" in config
    assert "secret" not in config
    assert "secret" not in (service.out / "run.json").read_text()
    # and it goes on from there
    again = serve(
        service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop()
    )
    assert again.status == "stopped"


@pytest.mark.parametrize(("given", "rank"), [(None, 1), (3, 3)])
def test_a_run_that_shares_lora_begins_with_it_at_the_rank_of_its_settings(
    given: int | None, rank: int, checkpoint: Path
) -> None:
    """Width 8 has rank 1 of itself (96 at 768); six sites of query, value and key."""
    service = a_service(checkpoint, method="fedlora-own", lora_rank=given)
    serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    first = load_file(RunFolder(service.out).global_path(0))
    assert sorted(tensor.shape for tensor in first.values()) == [(rank, 8)] * 6 + [(8, rank)] * 6
    assert all("lora" in name for name in first)


def test_a_rank_wider_than_the_base_is_refused(checkpoint: Path) -> None:
    assert "LoRA rank 9; choose 1 to 8" in refused(a_service(checkpoint, lora_rank=9))


def test_the_shape_that_costs_are_priced_at_stands_beside_the_base(checkpoint: Path) -> None:
    identity = identify(str(checkpoint))
    assert model_record(identity).priced is None
    basis = CostBasis(
        name="gpt2-small",
        base=BaseShape(layers=12, width=768, inner=3072),
        parameters=124_439_808,
        lora_rank=8,
    )
    record = model_record(identity, basis)
    assert (record.layers, record.width, record.parameters) == (2, 8, 32)
    assert record.priced == PricedRecord(
        name="gpt2-small", parameters=124_439_808, layers=12, width=768, lora_rank=8
    )


def test_a_broker_address_that_is_none_is_refused(checkpoint: Path) -> None:
    with pytest.raises(AddressError, match="mqtt://HOST:PORT") as told:
        serve(
            a_service(checkpoint, broker="127.0.0.1:1883"),
            notify=lambda _event, **_fields: None,
            on_start=lambda server: server.stop(),
        )
    assert told.value.exit_code == 2


def test_a_base_that_is_not_there_is_refused(checkpoint: Path) -> None:
    assert "nowhere" in refused(a_service(checkpoint, model=str(checkpoint / "nowhere")))


def run_python(script: str) -> str:
    """Run a script in a fresh interpreter; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_aggregator_runs_without_torch(checkpoint: Path) -> None:
    """Where torch and its companions cannot be imported, a run begins and is stopped."""
    script = f"""
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "transformers", "peft", "sklearn"):
                    raise ImportError(name + " is not installed")

        sys.meta_path.insert(0, Blocked())
        import cloud_aggregator.cli
        from cloud_aggregator.service import serve
        from cloud_aggregator.service_config import Service

        service = Service(
            run="trial", broker="mqtt://127.0.0.1:9", out={str(checkpoint.parent / "run")!r},
            clients=1, model={str(checkpoint)!r}, adapter_size=4,
        )
        record = serve(service, notify=lambda event, **fields: None, on_start=lambda s: s.stop())
        print(record.status, cloud_aggregator.cli.aggregator.name)
        """
    assert run_python(script) == "stopped aggregator"
    state = RunFolder(checkpoint.parent / "run").global_path(0)
    assert state.exists()  # the first global state was made without a model


def test_the_aggregator_loads_nothing_of_the_device_side() -> None:
    script = """
        import sys
        import cloud_aggregator.cli, cloud_aggregator.server, cloud_aggregator.service
        heavy = {"torch", "transformers", "peft", "sklearn", "edge_client"}
        print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
        """
    assert run_python(script) == "[]"


def test_a_device_loads_nothing_of_the_aggregator() -> None:
    script = """
        import sys
        import edge_client.cli, edge_client.service
        print([name for name in sys.modules if name.startswith("cloud_aggregator")])
        """
    assert run_python(script) == "[]"


# -- the run's state ------------------------------------------------------------------------------

PASSWORD = "battery-staple"  # noqa: S105
POSTGRES = f"postgresql+psycopg://pwff:{PASSWORD}@127.0.0.1:1/runs?sslmode=disable"


def test_the_state_of_a_run_is_a_file_in_its_folder_and_each_start_is_counted(
    checkpoint: Path,
) -> None:
    epochs = []
    for _ in range(2):
        serve(
            a_service(checkpoint),
            notify=lambda _event, **_fields: None,
            on_start=lambda server: (epochs.append(server._desk._epoch), server.stop()),
        )
    assert epochs == [1, 2]
    assert (checkpoint.parent / "run" / "state.sqlite").exists()


def test_the_address_of_the_store_may_come_from_the_environment_and_wins(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = checkpoint.parent / "elsewhere.sqlite"
    monkeypatch.setenv("PWFF_STORE", f"sqlite:///{elsewhere}")
    service = a_service(checkpoint, store="sqlite:////nowhere/state.sqlite")
    serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    assert elsewhere.exists()
    config = (service.out / "config.toml").read_text()
    assert f'store = "sqlite://{elsewhere}"' in config


def test_a_password_in_the_address_of_the_store_is_written_nowhere(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("psycopg")
    caplog.set_level("DEBUG")
    service = a_service(checkpoint, store=POSTGRES)
    with pytest.raises(StoreError) as told:
        serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    assert "the store postgresql+psycopg://127.0.0.1/runs cannot be used" in str(told.value)
    assert told.value.exit_code == 1
    monkeypatch.setattr("cloud_aggregator.service.Store", lambda *_: Store(service.out, "trial"))
    serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    config = (service.out / "config.toml").read_text()
    assert 'store = "postgresql+psycopg://127.0.0.1/runs"' in config
    for said in (str(told.value), caplog.text, config, repr(service)):
        assert PASSWORD not in said


def test_two_aggregators_on_one_run_are_refused(checkpoint: Path) -> None:
    service = a_service(checkpoint)
    with Store(service.out, "trial"):
        assert "another aggregator is at work on the run" in refused(service)


# -- how rounds end and updates count -------------------------------------------------------------


def counting_file(tmp_path: Path, text: str) -> Path:
    return write(tmp_path, f"{text}\n{CONFIG}")


def test_a_service_says_how_its_rounds_end_and_what_counts(tmp_path: Path) -> None:
    text = (
        'cohort = 2\nover_selection = 2\naggregation = "fedbuff"\nmax_staleness = 3\n'
        "replacements = false\nheartbeat_seconds = 10\nkeep_states = 4"
    )
    service = load_service(counting_file(tmp_path, text))
    assert service.rules == RoundRules(
        quorum=0.8, deadline_seconds=3600.0, over_selection=2.0, replacements=False
    )
    assert service.counting(service.rules, service.wanted).max_staleness == 3
    assert (service.heartbeat_seconds, service.keep_states) == (10.0, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cohort = 3", "cohort = 3 is above clients = 2"),
        ("over_selection = 2", "over_selection = 2 without a cohort"),
        ("over_selection = 11", "over_selection = 11"),
        ('aggregation = "krum"\nbyzantine = 1', "takes 5 updates, and a round of 2 clients"),
        ("clip_norm = 1.0", "is for aggregation 'norm-clipped'"),
        ("keep_states = 0", "keep_states = 0"),
    ],
)
def test_what_could_not_be_aggregated_is_refused_before_the_run(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as told:
        load_service(counting_file(tmp_path, text))
    assert said in str(told.value)


def test_a_run_is_not_gone_on_with_under_another_rule(checkpoint: Path) -> None:
    service = a_service(checkpoint)
    serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    said = refused(a_service(checkpoint, aggregation="median"))
    assert "holds a run whose aggregation is 'mean', and 'median' is asked" in said
