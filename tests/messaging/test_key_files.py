"""Keys from files and the environment: whole, of the right owner, and nobody else reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from messaging.access import PASSWORD_VARIABLE, USERNAME_VARIABLE, BrokerAccess
from messaging.errors import SecretError
from messaging.key_files import (
    DEVICE_VARIABLE,
    MASTER_VARIABLE,
    SIGNING_VARIABLE,
    VERIFY_VARIABLE,
    RunKeys,
    device_keys,
    run_keys,
)
from messaging.keys import SigningKey
from messaging.secret_files import read_secret, write_new, write_over

KEYS = RunKeys(run="trial", master=bytes(range(32)), signing_key=SigningKey(bytes(range(32, 64))))


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    path = tmp_path / "trial.keys.toml"
    write_new(path, KEYS.file(), secret=True)
    return path


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "trial.key.toml"
    write_new(path, KEYS.device("pi5-01").file(), secret=True)
    return path


def test_keys_survive_the_way_through_their_files(cloud: Path, device: Path) -> None:
    assert run_keys(cloud, "trial", {}) == KEYS
    assert device_keys(device, "trial", "pi5-01", {}) == KEYS.device("pi5-01")


def test_keys_come_from_the_environment_where_no_file_is_given() -> None:
    cloud = {MASTER_VARIABLE: KEYS.master.hex(), SIGNING_VARIABLE: KEYS.signing_key.seed.hex()}
    assert run_keys(None, "trial", cloud) == KEYS
    mine = KEYS.device("a")
    device = {DEVICE_VARIABLE: mine.key.hex(), VERIFY_VARIABLE: mine.verify_key.hex()}
    assert device_keys(None, "trial", "a", device) == mine


def test_without_file_and_environment_there_are_no_keys() -> None:
    assert run_keys(None, "trial", {}) is None
    assert device_keys(None, "trial", "a", {MASTER_VARIABLE: "00"}) is None


def told(path: Path | None, environment: dict[str, str] | None = None, run: str = "trial") -> str:
    with pytest.raises(SecretError) as caught:
        run_keys(path, run, environment or {})
    assert caught.value.exit_code == 2
    assert KEYS.master.hex() not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_file_that_others_can_read_is_refused_with_the_command_that_mends_it(
    cloud: Path, mode: int
) -> None:
    cloud.chmod(mode)
    assert f"open to others (mode {mode:o})" in told(cloud)
    assert f"chmod 600 {cloud}" in told(cloud)


def test_a_file_that_is_missing_of_another_run_or_damaged_is_told(cloud: Path) -> None:
    assert "No such file" in told(cloud.with_name("nowhere"))
    assert "is no file" in told(Path("/dev/null"))
    assert "is of run 'trial', and 'other' needs its own" in told(cloud, run="other")
    text = cloud.read_text()
    cloud.write_text(text.replace(KEYS.master.hex(), KEYS.master.hex()[:-2]))
    assert "'master' in" in told(cloud)
    assert "64 hexadecimal digits" in told(cloud)
    cloud.write_text(text.replace("signing", "singing"))
    assert "has no 'signing'" in told(cloud)
    cloud.write_text(text + "master = ")
    assert "is no valid TOML" in told(cloud)
    cloud.write_bytes(bytes(65_537))
    assert "larger than 65536 bytes" in told(cloud)


def test_a_devices_file_is_of_that_device(device: Path) -> None:
    with pytest.raises(SecretError, match=r"is of client 'pi5-01', and 'pi5-02' needs its own"):
        device_keys(device, "trial", "pi5-02", {})
    assert "has no 'master'" in told(device)


def test_half_of_the_environment_is_told() -> None:
    assert f"{SIGNING_VARIABLE} is not; set both" in told(None, {MASTER_VARIABLE: "00" * 32})
    said = told(None, {MASTER_VARIABLE: "00" * 31, SIGNING_VARIABLE: "00" * 32})
    assert f"{MASTER_VARIABLE} is no key" in said


def test_a_file_that_is_there_is_not_written_over(cloud: Path) -> None:
    assert not write_new(cloud, b"other", secret=True)
    assert cloud.read_bytes() == KEYS.file()
    write_over(cloud, b"other", secret=True)
    assert read_secret(cloud, "key") == b"other"
    assert [p.name for p in cloud.parent.iterdir()] == [cloud.name]  # nothing half-written is left


def test_a_secret_is_its_owners_alone_from_the_first_byte(tmp_path: Path) -> None:
    write_new(tmp_path / "secret", b"1", secret=True)
    write_new(tmp_path / "public", b"1", secret=False)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "public").stat().st_mode & 0o077 & ~0o044 == 0


# -- user and password ----------------------------------------------------------------------------


def test_user_and_password_come_from_the_file_then_the_address_then_the_environment(
    tmp_path: Path,
) -> None:
    path = tmp_path / "password"
    write_new(path, b"from the file\n", secret=True)
    access = BrokerAccess(username="me", password_file=path)
    environment = {USERNAME_VARIABLE: "you", PASSWORD_VARIABLE: "from the environment"}
    address = ("they", "from the address")
    assert access.login(address, environment) == ("me", "from the file")
    write_over(path, b"changed", secret=True)  # and the next connection has it
    assert access.login(address, environment) == ("me", "changed")
    assert BrokerAccess().login(address, environment) == address
    assert BrokerAccess().login(None, environment) == ("you", "from the environment")
    assert BrokerAccess().login(None, {}) is None


def test_a_password_without_a_user_is_told(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=f"{USERNAME_VARIABLE} is not; set both"):
        BrokerAccess().login(None, {PASSWORD_VARIABLE: "x"})
    with pytest.raises(ValueError, match="password_file is given alone"):
        BrokerAccess(password_file=tmp_path / "x")
    path = tmp_path / "open"
    path.write_text("x")
    path.chmod(0o644)
    with pytest.raises(SecretError, match="open to others"):
        BrokerAccess(username="me", password_file=path).login(None, {})
