"""A password in a broker's address is used to connect, and stands nowhere else."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud_aggregator.metrics import Metrics
from cloud_aggregator.service import serve
from cloud_aggregator.service_config import Service
from device_profiles import logs
from messaging.errors import AddressError
from messaging.mqtt import MqttNetwork, parse_address
from pwff import command
from tests.cloud_aggregator.test_service import a_service, checkpoint  # noqa: F401 - a fixture

SECRET = "correct-horse"  # noqa: S105
URL = f"mqtt://operator:{SECRET}@127.0.0.1:9"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Yield everything that this process logs, every level of every library; then put it back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for handler in handlers:
        root.removeHandler(handler)
    stream = io.StringIO()
    logs.start("json", "debug", stream=stream)
    yield stream
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_a_run_that_looks_for_its_broker_writes_no_password(
    checkpoint: Path,  # noqa: F811
    log: io.StringIO,
) -> None:
    service = a_service(checkpoint, broker=URL)
    metrics = Metrics(service.run, service.method)
    record = serve(service, notify=metrics, on_start=lambda server: server.stop())
    assert record.status == "stopped"
    written = [path for path in service.out.rglob("*") if path.is_file()]
    assert {"run.json", "config.toml", "metrics.jsonl"} <= {path.name for path in written}
    assert "mqtt://127.0.0.1:9" in (service.out / "config.toml").read_text()
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in log.getvalue()
    assert SECRET.encode() not in metrics.page()


def test_a_connection_that_is_refused_logs_no_password(log: io.StringIO) -> None:
    network = MqttNetwork(URL)
    logging.getLogger("test").info("%s %r %r", network.address, network.address, vars(network))
    assert "127.0.0.1" in log.getvalue()
    assert SECRET not in log.getvalue()


@pytest.mark.parametrize(
    "url",
    [
        f"mqtt://operator:{SECRET}@127.0.0.1:99999",
        f"mqtt://operator:{SECRET}@127.0.0.1:9/path",
        f"mqtt://operator:{SECRET}@:9",
        f"http://operator:{SECRET}@127.0.0.1",
        f"mqtt://operator:{SECRET}@127.0.0.1:port",
        f"mqtt://operator:{SECRET}@[::1",
    ],
)
def test_an_address_that_is_wrong_is_told_without_its_password(url: str) -> None:
    with pytest.raises(AddressError) as told:
        parse_address(url)
    assert SECRET not in str(told.value)
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__ or told.value.__context__ is None


CLOUD = 'run = "r"\nout = "x"\nclients = 1\n'
DEVICE = 'run = "r"\nclient = "a"\nfolder = "f"\nprofile = "p"\ndata = "d"\n'


@pytest.mark.parametrize("name", ["aggregator", "client"])
@pytest.mark.parametrize(
    "mistake",
    [
        f'brokr = "{URL}"\n',
        f'broker = ["{URL}"]\n',
        f'broker = "{URL}\n',  # the string is never closed
        f'broker = "{URL}"\nbroker = "{URL}"\n',
        f'broker = "{URL}/path"\nseed = -1\n',
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_mistake_in_a_configuration_is_told_without_the_password(
    form: str, mistake: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text((CLOUD if name == "aggregator" else DEVICE) + mistake)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    done = CliRunner().invoke(command, [name, "--config", str(path), "--log-format", form])
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    assert done.exit_code != 0
    assert SECRET not in done.output
    assert SECRET not in str(done.exception)


def test_an_address_shows_no_password_in_its_own_words() -> None:
    service = Service.model_validate({"run": "r", "broker": URL, "out": "x", "clients": 1})
    address = parse_address(service.broker)
    assert address.password == SECRET
    assert SECRET not in f"{address} {address!r} {json.dumps(str(address))}"
