"""`pwff doctor`: what it says works was run; what is missing is named with its remedy."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from device_profiles.config_files import read_toml
from edge_client import doctor as doctor_module
from edge_client import trials
from edge_client.doctor import (
    PACKAGES,
    TRIED,
    Finding,
    check_base,
    check_broker,
    check_hub,
    check_kit,
    doctor,
    fits,
    look_at_disk,
    look_at_memory,
    look_at_packages,
    run_trials,
)
from edge_client.trials import (
    TRIALS,
    TRIED_ON,
    AbsentError,
    NoBackendError,
    Outcome,
    WrongNumbersError,
    in_words,
    relative_error,
    try_base,
    try_out,
    try_precision,
)
from quantization.backends.dense import hold_fp32
from quantization.precision import DEVICES, PRECISIONS, Backend, Precision, available

ROOT = Path(__file__).parents[2]

WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
import pwff
pwff.main()
"""


def run(*command: str) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    """Return exit code, answer and findings (by area and what) of a call of the command."""
    done = subprocess.run(
        [sys.executable, *command, "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    answer = json.loads(done.stdout)
    return done.returncode, answer, {f"{f['area']} {f['what']}": f for f in answer["findings"]}


@pytest.fixture(scope="module")
def here() -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    """What the command says about this machine, which has the extras that the tests need."""
    return run("pwff.py")


@pytest.mark.broker
def test_all_that_a_default_run_needs_works_here(here: Any) -> None:
    code, answer, findings = here
    assert [name for name, finding in findings.items() if finding["state"] == "missing"] == []
    assert (code, answer["ok"]) == (0, True)


def test_exit_code_and_ok_follow_from_what_is_missing(here: Any) -> None:
    code, answer, findings = here
    missing = any(finding["state"] == "missing" for finding in findings.values())
    assert (code, answer["ok"]) == (int(missing), not missing)


def test_every_extra_and_the_machine_are_looked_at(here: Any) -> None:
    *_, findings = here
    assert {f"installed {extra}" for extra in PACKAGES} <= set(findings)
    assert {"installed python", "machine cpu", "machine memory", "machine disk"} <= set(findings)
    assert f"torch {torch.__version__}" in findings["installed edge"]["found"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_precisions_are_run_with_the_backend_that_holds_them(here: Any, precision: str) -> None:
    *_, findings = here
    finding = findings[f"runs {precision} cpu"]
    assert finding["state"] == "ok"
    assert finding["found"].startswith("CPU: forward and backward run by ")
    assert available()[precision].backend in finding["found"]


def test_a_gpu_that_is_not_there_is_said_once(here: Any) -> None:
    *_, findings = here
    gpu = [finding for name, finding in findings.items() if name.endswith(" cuda")]
    assert gpu
    assert torch.cuda.is_available() or [f["found"] for f in gpu] == ["torch sees no GPU"]


def test_it_says_where_and_in_what_runs_train(here: Any) -> None:
    *_, findings = here
    assert "on the CPU, on a base in any precision" in findings["runs training"]["found"]


def test_hub_is_not_asked_when_it_is_switched_off(here: Any) -> None:
    *_, findings = here
    assert findings["hub huggingface"]["state"] == "note"
    assert "HF_HUB_OFFLINE is set" in findings["hub huggingface"]["found"]


def test_without_the_edge_extra_it_says_what_to_install() -> None:
    names = ("torch", "transformers", "peft", "sklearn", "huggingface_hub", "bitsandbytes")
    code, answer, findings = run("-c", WITHOUT.format(names=names))
    assert (code, answer["ok"]) == (1, False)
    assert findings["installed edge"]["state"] == "missing"
    assert findings["installed edge"]["found"] == "not installed"
    assert findings["installed edge"]["remedy"] == "pip install 'pwff[edge]'"
    assert findings["installed core"]["state"] == "ok"
    assert findings["broker embedded"]["state"] == "ok"
    assert findings["bundled kit"]["state"] == "ok"
    assert findings["runs fp32 cpu"]["state"] == "missing"
    assert findings["runs fp32 cpu"]["found"].startswith("not tried: torch, ")
    assert findings["runs bf16 cpu"]["state"] == "note"
    assert findings["hub huggingface"]["found"].startswith("not asked: huggingface_hub")


def test_without_a_package_of_the_core_it_says_so_and_stops() -> None:
    code, _, findings = run("-c", WITHOUT.format(names=("pydantic",)))
    assert code == 1
    assert findings["installed core"]["state"] == "missing"
    assert "not installed: pydantic" in findings["installed core"]["found"]
    assert findings["installed core"]["remedy"] == "pip install 'pwff'"
    assert {finding["area"] for finding in findings.values()} == {"installed"}


def answer_with(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> Any:
    """Return what the command gives for these findings."""
    monkeypatch.setattr(doctor_module, "examine", lambda: iter(findings))
    return CliRunner(env={"COLUMNS": "100"}).invoke(doctor, [], standalone_mode=False)


FINE = Finding(area="installed", what="core", state="ok", found="click [8]")
NOTE = Finding(area="installed", what="ray", state="note", found="not there", remedy="get ray")
BAD = Finding(area="broker", what="embedded", state="missing", found="none", remedy="get one")


def test_table_shows_each_finding_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    result = answer_with(monkeypatch, FINE, NOTE, BAD)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["installed", "core", "ok", "click", "[8]"] in lines
    assert ["ray", "note", "not", "there"] in lines
    assert ["broker", "embedded", "missing", "none"] in lines
    assert ["Remedy:", "get", "ray"] in lines
    assert ["Remedy:", "get", "one"] in lines
    assert "does not work here yet: broker embedded" in result.stdout
    assert result.return_value == 1


def test_a_note_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    result = answer_with(monkeypatch, FINE, NOTE)
    assert "All that pwff emulate needs works here." in result.stdout
    assert result.return_value == 0


def test_packages_are_those_of_the_project_file() -> None:
    project = read_toml(ROOT / "pyproject.toml")["project"]
    stated = {"core": project["dependencies"], **project["optional-dependencies"]}
    for extra, packages in PACKAGES.items():
        requirements = [r.partition(";")[0].strip() for r in stated[extra]]
        assert {f"{name}{bounds}" for name, bounds in packages.items() if name != "tomli"} == {
            r for r in requirements if not r.startswith(("pwff[", "tomli>"))
        }
    assert set(PACKAGES) == set(stated) - {"dev", "all"}


@pytest.mark.parametrize("bounds", [">=2.4", ">=4.57,<6", ">=0.1.0", ">=2.1"])
@pytest.mark.parametrize(
    "version",
    ["0.1", "0.0.9", "2.3.9", "2.4", "2.4.0", "2.13.0+cpu", "4.57.6", "5.9", "6", "6.0.1", "10.0"],
)
def test_versions_fit_as_packaging_says(version: str, bounds: str) -> None:
    assert fits(version, bounds) == (Version(version) in SpecifierSet(bounds))


def test_a_boards_own_build_of_a_version_is_that_version() -> None:
    assert fits("2.4.0a0+07cecf4168.nv24.05", ">=2.4")  # a Jetson's; no pre-release there
    assert not fits("2.3.0a0+ebedce2", ">=2.4")


@pytest.mark.parametrize(("extra", "state"), [("edge", "missing"), ("broker", "note")])
def test_packages_that_are_too_old_are_named_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, extra: str, state: str
) -> None:
    monkeypatch.setattr(doctor_module, "version_of", lambda _package: "0.0.1")
    finding = look_at_packages(extra)
    assert finding.state == state
    name, bounds = next(iter(PACKAGES[extra].items()))
    assert f"does not fit: {name} 0.0.1 (needs {bounds})" in finding.found
    assert finding.remedy == f"pip install 'pwff[{extra}]'"


def test_an_extra_in_parts_names_the_parts_that_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.0", "transformers": "4.57.1", "scikit-learn": "1.5"}
    monkeypatch.setattr(doctor_module, "version_of", versions.get)
    finding = look_at_packages("edge")
    assert finding.found == (
        "torch 2.9.0, transformers 4.57.1, scikit-learn 1.5; not installed: peft"
    )
    assert finding.state == "missing"


@pytest.mark.parametrize(("free", "state"), [(5 * 10**8, "note"), (5 * 10**9, "ok")])
def test_little_room_is_noted(monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    memory = SimpleNamespace(available=free, total=8 * 10**9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=free, total=10**12))
    found = {5 * 10**8: "500 MB", 5 * 10**9: "5 GB"}[free]
    assert look_at_memory().state == look_at_disk().state == state
    assert look_at_memory().found == f"{found} free of 8 GB"
    assert look_at_disk().found == f"{found} free of 1 TB in this folder"


@pytest.mark.broker
def test_broker_is_started_and_passes_a_message() -> None:
    finding = check_broker()
    assert finding.state == "ok"
    assert finding.found.startswith(("mosquitto starts in ", "iotcore starts in "))
    assert "a message comes back in " in finding.found


def test_no_broker_on_path_is_missing_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("messaging.broker.find_mosquitto", lambda: None)
    monkeypatch.setitem(sys.modules, "iotcore", None)
    finding = check_broker()
    assert finding.state == "missing"
    assert finding.found == "neither mosquitto nor the package iotcore is installed"
    assert finding.remedy == "install mosquitto, or: pip install 'pwff[broker]'"


def test_broker_that_does_not_start_is_missing_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "mosquitto"
    program.write_text("#!/bin/sh\necho out of luck\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = check_broker()
    assert finding.state == "missing"
    assert finding.found == "the embedded broker (mosquitto) did not start: out of luck"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does when it is asked about a model."""

    def do_GET(self) -> None:
        """Give a model's description."""
        body = json.dumps({"id": "gpt2", "modelId": "gpt2", "siblings": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def hub_at(port: int) -> Iterator[None]:
    """Let the hub be at a port of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


def test_hub_that_answers_is_fine() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with hub_at(server.server_port):
            finding = check_hub(wait_seconds=10)
        server.shutdown()
        thread.join()
    assert finding.state == "ok"
    assert finding.found == f"http://127.0.0.1:{server.server_port} answers"


def test_hub_that_is_silent_is_a_note_after_the_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, hub_at(server.getsockname()[1]):
        finding = check_hub(wait_seconds=0.2)
    assert finding.state == "note"
    assert " does not answer (" in finding.found


def test_kit_is_counted() -> None:
    # 1,080 rows, one in five held out
    assert check_kit().found == "864 examples to train on, 216 held out"


def test_missing_base_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("quantization.identity.mini_folder", lambda: tmp_path)
    finding = check_base()
    assert finding.state == "missing"
    assert finding.found == f"{tmp_path} has no readable config.json; give a checkpoint"


def test_a_base_that_is_not_there_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def note(names: list[str]) -> list[Outcome]:
        tried.extend(names)
        return []

    monkeypatch.setattr(trials, "try_out", note)
    monkeypatch.setattr(doctor_module, "version_of", lambda _package: "99")
    list(run_trials(base=False))
    assert set(tried) == set(TRIED) - {"base"}


def test_what_fails_is_missing_only_if_a_default_run_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_module, "version_of", lambda _package: "99")
    monkeypatch.setattr(
        trials,
        "try_out",
        lambda names: [Outcome(name=n, state="fails", words="died") for n in reversed(names)],
    )
    states = {finding.what: finding.state for finding in run_trials(base=True)}
    assert [what for what, state in states.items() if state == "missing"] == ["base", "fp32 cpu"]
    assert [what for what, state in states.items() if state == "ok"] == ["training"]


def test_each_trial_of_the_doctor_is_one_that_can_be_run() -> None:
    assert set(TRIED) == set(TRIALS)


def test_trial_that_kills_its_process_has_failed_and_the_next_one_runs() -> None:
    chosen: dict[str, Any] = {
        "fine": partial(str, "seven"),
        "wrong": partial(int, "seven"),
        "deadly": partial(signal.raise_signal, signal.SIGILL),
        "last": partial(str, "eight"),
    }
    outcomes = list(try_out(list(chosen), trials=chosen))
    assert [outcome.name for outcome in outcomes] == list(chosen)
    assert [outcome.state for outcome in outcomes] == ["works", "fails", "fails", "works"]
    assert [outcome.words for outcome in outcomes] == [
        "seven",
        "ValueError: invalid literal for int() with base 10: 'seven'",
        "its process ended (signal SIGILL)",
        "eight",
    ]


def test_trial_without_an_end_has_failed_and_leaves_no_process() -> None:
    before = set(psutil.Process().children())
    (outcome,) = try_out(["endless"], wait_seconds=0.5, trials={"endless": signal.pause})
    assert (outcome.state, outcome.words) == ("fails", "no answer within 0.5 s")
    left = set(psutil.Process().children()) - before
    assert [p for p in left if "spawn_main" in " ".join(p.cmdline())] == []


def test_relative_error_is_that_of_the_whole() -> None:
    # ||(0, 0.5)|| / ||(3, 4)||
    assert relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert math.isnan(relative_error([math.nan, 4.0], [3.0, 4.0]))


def test_int8_and_nf4_need_no_extra_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = set(PACKAGES["quantized"])
    monkeypatch.setattr(doctor_module, "version_of", lambda p: None if p in lacking else "99")
    tried: list[str] = []

    def note(names: list[str]) -> list[Outcome]:
        tried.extend(names)
        return []

    monkeypatch.setattr(trials, "try_out", note)
    list(run_trials(base=True))
    assert {"int8 cpu", "int8-dynamic cpu", "nf4 cpu"} <= set(tried)


def test_every_precision_is_tried_wherever_a_backend_may_run() -> None:
    places = {
        name: tuple(d for d in DEVICES if any(d in b.devices for b in row.backends))
        for name, row in PRECISIONS.items()
    }
    assert places == TRIED_ON


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_a_precision_that_runs_is_told_with_its_backend(precision: str) -> None:
    assert re.match(
        r"CPU: forward and backward run by (torch|bitsandbytes)\b", try_precision(precision, "cpu")
    )


def test_a_precision_says_why_the_backend_before_the_one_taken_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = Backend(name="first", hold=hold_fp32, devices=())
    row = Precision(backends=(dead, *PRECISIONS["int8"].backends), weight_error=0.02)
    monkeypatch.setitem(PRECISIONS, "int8", row)
    said = try_precision("int8", "cpu")
    assert said == "CPU: forward and backward run by torch (not by first: not on cpu)"


def test_a_backend_with_wrong_numbers_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Backend(name="wrong", hold=lambda weight, device: hold_fp32(1.25 * weight, device))
    monkeypatch.setitem(PRECISIONS, "fp32", Precision(backends=(wrong,), weight_error=1e-6))
    with pytest.raises(NoBackendError, match=r"wrong: wrong numbers: .* of a weight 2\.5e-01"):
        try_precision("fp32", "cpu")


def test_a_gpu_is_absent_where_torch_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AbsentError, match="torch sees no GPU"):
        try_precision("int8", "cuda")


def test_a_foreign_error_is_told_with_its_name_and_an_own_one_without() -> None:
    assert in_words(NoBackendError("torch: slow on this processor")) == (
        "torch: slow on this processor"
    )
    assert in_words(RuntimeError("no kernel\nat line 7")) == "RuntimeError: no kernel"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and weights that have seen nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from edge_client.pretrain import Corpus, train_tokenizer

    folder = tmp_path_factory.mktemp("untrained")
    corpus = Corpus(documents=["Nothing that was ever learnt."], held_out=[], sources=[])
    tokenizer = train_tokenizer(corpus, 300)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_base_that_has_learnt_nothing_does_not_work(untrained: Path) -> None:
    with pytest.raises(WrongNumbersError, match="not learnt to predict"):
        try_base(str(untrained))


def test_any_base_runs_with_its_modules_on(
    monkeypatch: pytest.MonkeyPatch, untrained: Path
) -> None:
    monkeypatch.setattr(trials, "_BLIND_SHARE", 2.0)
    # three adapters and three LoRA sites a block, two blocks
    assert "with 6 adapters and 6 LoRA modules on" in try_base(str(untrained))
