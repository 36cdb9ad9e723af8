"""``pwff certs``: a folder that is made once, gone on with, and never written over unasked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from messaging.broker import find_mosquitto
from messaging.broker_rules import access_rules, mosquitto_config
from messaging.chunks import CHUNK_BYTES
from messaging.errors import SecretError
from messaging.key_files import device_keys, run_keys
from messaging.memory import matches
from messaging.tls import TlsFiles
from pwff import command

ROOT = Path(__file__).parents[2]
ASKED = ["--run", "first-run", "--client", "jetson-1", "--client", "laptop-1", "--host", "b.lan"]


def certs(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["certs", *arguments])


def files(folder: Path) -> dict[str, bytes]:
    """Return everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_machine_has_a_folder_of_its_own_that_is_enough_for_it(tmp_path: Path) -> None:
    done = certs(str(tmp_path), *ASKED)
    assert done.exit_code == 0, done.output
    assert set(files(tmp_path)) == {
        "ca/ca.pem", "ca/ca.key",
        "broker/ca.pem", "broker/broker.pem", "broker/broker.key", "broker/acl",
        "broker/mosquitto.conf",
        "aggregator/ca.pem", "aggregator/aggregator.pem", "aggregator/aggregator.key",
        "aggregator/first-run.keys.toml",
        *(f"clients/{c}/{name}" for c in ("jetson-1", "laptop-1")
          for name in ("ca.pem", f"{c}.pem", f"{c}.key", "first-run.key.toml")),
    }  # fmt: skip
    cloud = run_keys(tmp_path / "aggregator" / "first-run.keys.toml", "first-run", {})
    assert cloud is not None
    for client in ("jetson-1", "laptop-1"):
        place = tmp_path / "clients" / client
        mine = device_keys(place / "first-run.key.toml", "first-run", client, {})
        assert mine == cloud.device(client)
        TlsFiles(
            ca=place / "ca.pem",
            certificate=place / f"{client}.pem",
            private_key=place / f"{client}.key",
        ).check()
    for path in tmp_path.rglob("*"):
        if path.suffix == ".key" or path.name.endswith((".keys.toml", ".key.toml")):
            assert path.stat().st_mode & 0o777 == 0o600, path


def test_called_again_it_makes_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    certs(str(tmp_path), *ASKED)
    before = files(tmp_path)
    done = certs(str(tmp_path), *ASKED, "--client", "phone-1")
    assert done.exit_code == 0
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[1] for name in set(after) - set(before)} == {"phone-1"}
    assert "kept     " in done.output
    assert "made     " in done.output


def test_a_renewed_device_has_another_certificate_and_the_same_key_in_the_run(
    tmp_path: Path,
) -> None:
    certs(str(tmp_path), *ASKED)
    before = files(tmp_path)
    assert certs(str(tmp_path), *ASKED, "--renew", "jetson-1").exit_code == 0
    after = files(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"clients/jetson-1/jetson-1.pem", "clients/jetson-1/jetson-1.key"}


def test_half_a_pair_is_told_and_not_made_up_for(tmp_path: Path) -> None:
    certs(str(tmp_path), *ASKED)
    (tmp_path / "clients" / "jetson-1" / "jetson-1.key").unlink()
    done = certs(str(tmp_path), *ASKED)
    assert "give --renew jetson-1" in str(done.exception)
    (tmp_path / "ca" / "ca.key").unlink()
    assert "ca.key is not; bring it back" in str(certs(str(tmp_path), *ASKED).exception)


def test_keys_of_a_run_that_were_made_anew_do_not_fit_those_of_its_devices(tmp_path: Path) -> None:
    certs(str(tmp_path), *ASKED)
    (tmp_path / "aggregator" / "first-run.keys.toml").unlink()
    assert "is not of the run's keys" in str(certs(str(tmp_path), *ASKED).exception)


def test_a_broker_that_is_reached_by_another_name_is_told_what_its_certificate_is_for(
    tmp_path: Path,
) -> None:
    certs(str(tmp_path), *ASKED)
    said = str(certs(str(tmp_path), "--host", "other.lan").exception)
    assert "is for b.lan, and other.lan is asked for; give --renew broker" in said
    assert certs(str(tmp_path), "--host", "other.lan", "--renew", "broker").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--client", "../../etc"], "--client '../../etc' is no name"),
        (["--client", "a/b"], "is no name"),
        (["--run", ".."], "--run '..' is no name"),
        (["--client", "aggregator"], "would have the rights of the aggregator"),
        (["--client", "broker"], "would have the rights of the broker"),
        (["--renew", "jetson-9"], "--renew 'jetson-9' is not made here; add --client jetson-9"),
        (["--host", "mqtts://b"], "is no name and no address"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_made_outside(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "secrets"
    done = certs(str(folder), *arguments)
    assert words in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 2
    assert [p.name for p in tmp_path.iterdir()] in ([], ["secrets"])


def allowed(user: str, kind: str, topic: str) -> bool:
    """Return whether the access rules let a user read or write a topic."""
    mine, found = False, False
    for line in access_rules().splitlines():
        if line.startswith("user "):
            mine = line.split()[1] == user
        elif line.startswith("topic ") and mine:
            _, what, pattern = line.split()
            found |= what in (kind, "readwrite") and matches(pattern, topic)
        elif line.startswith("pattern "):
            _, what, pattern = line.split()
            found |= what in (kind, "readwrite") and matches(pattern.replace("%u", user), topic)
    return found


def test_a_device_has_the_rights_that_the_protocol_needs_and_no_other() -> None:
    mine, others, model = "pwff/v1/r/c/a/", "pwff/v1/r/c/b/", "pwff/v1/r/model/latest"
    for topic in (mine + "up/control", mine + "up/0", mine + "state"):
        assert allowed("a", "write", topic)
        assert not allowed("a", "read", topic)
    for topic in (mine + "down", model):
        assert allowed("a", "read", topic)
        assert not allowed("a", "write", topic)
    for end in ("up/control", "state", "down"):
        assert not allowed("a", "write", others + end)
        assert not allowed("a", "read", others + end)
        assert allowed("aggregator", "write", others + end)
        assert allowed("aggregator", "read", others + end)


def test_the_example_of_a_brokers_configuration_is_what_the_command_writes() -> None:
    place = ROOT / "deploy" / "mosquitto"
    expected = mosquitto_config(8883, "/etc/mosquitto/pwff", "/var/lib/mosquitto")
    assert (place / "mosquitto.conf").read_text() == expected
    assert (place / "acl").read_text() == access_rules()
    assert 1000 * CHUNK_BYTES < 2**27  # as many as are in flight at the most, by default
    for line in (
        "allow_anonymous false",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "max_queued_messages 100000",
        f"max_queued_bytes {2**27}",
        "max_packet_size 300000",
        "persistence true",
        "autosave_on_changes true",
        "autosave_interval 1",
    ):
        assert line in expected.splitlines()


def test_what_access_rules_deny_is_logged_where_it_is_asked_for() -> None:
    plain = mosquitto_config(8883, "f", "d")
    assert "log_type debug" not in plain
    logged = mosquitto_config(8883, "f", "d", denials=True)
    assert logged.startswith(plain)
    assert logged.splitlines()[-1] == "log_type debug"


def test_a_configuration_that_is_kept_and_logs_no_denials_is_told(tmp_path: Path) -> None:
    folder = str(tmp_path / "secrets")
    certs(folder)
    told = certs(folder, "--log-denials")
    assert isinstance(told.exception, SecretError)
    assert told.exception.exit_code == 2
    assert "is kept, and it logs no denials; put 'log_type debug' into it" in str(told.exception)
    config = tmp_path / "secrets" / "broker" / "mosquitto.conf"
    config.write_text(config.read_text() + "log_type debug\n")
    assert certs(folder, "--log-denials").exit_code == 0


def test_mosquitto_takes_the_configuration(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    folder = tmp_path / "secrets"
    (tmp_path / "data").mkdir()
    installed, data = str(folder / "broker"), str(tmp_path / "data")
    certs(str(folder), "--installed", installed, "--data", data, "--port", "0", "--log-denials")
    config = folder / "broker" / "mosquitto.conf"
    assert "log_type debug" in config.read_text()
    # a port that none can be: whatever is wrong before that would be told first
    done = subprocess.run(
        [find_mosquitto() or "", "-c", str(config)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    assert all("port" in line for line in said if line.startswith("Error")), said
