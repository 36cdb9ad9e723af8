"""The command ``prefer``, as a person and as a script call it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from device_profiles.errors import InputError
from edge_client.data.preferences import Pair, load_preferences
from edge_client.inference.generation import Speaker
from edge_client.prefer.ranking import RankingError
from edge_client.prefer_command import prefer
from quantization.errors import MissingExtraError
from tests.edge_client.inference.conftest import a_speaker
from tests.edge_client.prefer.conftest import KEY, Api, Reply, a_babbler, api, said

__all__ = ["api"]  # a fixture

WAIT_SECONDS = 60.0  # for a process; a test that waits so long has failed
PROMPTS = [f"Ask {i}." for i in range(4)]


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> Speaker:
    """Let a babbler answer instead of a model in a folder."""
    made = a_babbler()
    monkeypatch.setattr("edge_client.prefer_command.open_candidate_model", lambda *_, **__: made)
    monkeypatch.setattr("edge_client.prefer_command.FIRST_WAIT_SECONDS", 0.0)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder with a file of prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


def call(*arguments: str, said: str = "", objective: str = "helpfulness") -> Result:
    command = ["M", "--objective", objective, "--out", "out.jsonl", *arguments]
    if "--prompts" not in arguments:
        command += ["--prompts", "prompts.txt"]
    return CliRunner().invoke(
        prefer, command, input=said, standalone_mode=False, catch_exceptions=False
    )


def judged(api: Api, *arguments: str, **changes: Any) -> Result:
    """Call with the endpoint as judge."""
    place = ("--judge", "endpoint", "--endpoint", api.url, "--judge-model", "judge-1")
    return call(*place, *arguments, **changes)


def pairs(objective: str = "helpfulness") -> list[Pair]:
    return load_preferences("out.jsonl", objective).pairs


def judges() -> set[str]:
    """Return who judged the pairs."""
    lines = Path("out.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["judge"] for line in lines}


@pytest.mark.usefixtures("speaker", "folder")
def test_a_person_ranks_through_a_pipe_stops_and_goes_on() -> None:
    done = call(said="1\nx\n2\nq\n")
    assert (done.return_value, done.stdout) == (0, "2 pairs added, 2 in out.jsonl\n")
    assert "Which response helps more?" in done.stderr
    first = pairs()
    done = call(said="s\n1\n1\n")
    assert done.stdout.splitlines() == [
        "1 pair added, 3 in out.jsonl",
        "1 prompt skipped: it was passed over",
    ]
    assert pairs()[:2] == first
    assert len({pair.instruction for pair in pairs()}) == 3
    assert judges() == {"human"}


@pytest.mark.usefixtures("speaker", "folder")
def test_count_is_what_the_file_holds_in_the_end() -> None:
    assert call("--count", "2", said="1\n1\n1\n").stdout == "2 pairs added, 2 in out.jsonl\n"
    assert call("--count", "2", said="1\n").stdout == "0 pairs added, 2 in out.jsonl\n"
    done = call("--count", "3", "--json", said="1\n")
    assert json.loads(done.stdout) == {
        "out": "out.jsonl",
        "objective": "helpfulness",
        "pairs": 3,
        "judged": 1,
        "skipped": {},
        "stopped": "enough",
        "tokens": None,
    }


@pytest.mark.usefixtures("folder")
def test_a_model_that_repeats_itself_makes_no_pair_and_that_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "edge_client.prefer_command.open_candidate_model", lambda *_, **__: a_speaker("yes")
    )
    done = call(said="1\n")
    assert done.return_value == 1
    assert "4 prompts skipped: the model gave the same response" in done.stdout
    assert Path("out.jsonl").read_bytes() == b""


@pytest.mark.usefixtures("speaker", "folder")
def test_an_endpoint_ranks_what_a_judge_of_letters_would(api: Api) -> None:
    def most_a(body: dict[str, Any], _number: int) -> Reply:
        asked = body["messages"][1]["content"]
        first, _, second = asked.partition("[Response A]\n")[2].partition("\n\n[Response B]\n")
        better = first.count("a") >= second.partition("\n")[0].count("a")
        return said("A" if better else "B", prompt_tokens=100, completion_tokens=1)

    api.answer = most_a
    done = judged(api, "--yes", objective="harmlessness")
    assert done.return_value == 0
    assert done.stdout.splitlines() == [
        "4 pairs added, 4 in out.jsonl",
        "tokens by the endpoint's count: 400 in, 4 out",
    ]
    # Whichever side it was shown on, the response with more a's is the chosen one.
    assert all(p.chosen.count("a") >= p.rejected.count("a") for p in pairs("harmlessness"))
    assert judges() == {"endpoint judge-1"}
    assert KEY not in done.output + Path("out.jsonl").read_text(encoding="utf-8")


@pytest.mark.usefixtures("speaker", "folder")
@pytest.mark.parametrize(("answer", "sent"), [("y\n", 3), ("n\n", 0)])
def test_requests_and_cost_are_shown_and_confirmed_before_anything_is_sent(
    api: Api, answer: str, sent: int
) -> None:
    done = judged(api, "--count", "3", "--price-per-million-tokens", "2.5", said=answer)
    assert "3 requests to judge-1: at most about " in done.stderr
    words = done.stderr.split()
    read, written = int(words[words.index("about") + 1]), 3 * 8
    cost = float(words[words.index("most", words.index("written,")) + 1])
    assert cost == pytest.approx((read + written) * 2.5e-6, abs=5e-5)  # four decimals are shown
    assert f"leave this device for {api.url[7:-3]}\n" in done.stderr
    assert (done.return_value, len(api.bodies)) == (0, sent)
    assert ("nothing was sent" in done.stderr) == (not sent)


@pytest.mark.usefixtures("speaker", "folder")
def test_an_endpoint_that_fails_in_the_middle_loses_nothing(api: Api) -> None:
    api.script(said("A"), said("B"), (500, {}, ""))
    with pytest.raises(
        RankingError, match=r"in 2 tries .*HTTP 500.*out\.jsonl keeps its 2 pairs, and the same"
    ):
        judged(api, "--yes", "--tries", "2")
    kept = pairs()
    assert len(kept) == 2
    api.script(said("A"))
    judged(api, "--yes")
    assert pairs()[:2] == kept
    assert len(pairs()) == 4


@pytest.mark.usefixtures("speaker", "folder")
def test_an_endpoint_of_nonsense_is_stopped_and_one_such_answer_is_not(api: Api) -> None:
    api.script(said("maybe"))
    with pytest.raises(RankingError, match=r"6 of 6 answers of 'judge-1'.*keeps its 0 pairs"):
        judged(api, "--yes")
    api.answer = lambda _body, number: said("maybe" if number < 9 else "B")
    done = judged(api, "--yes")
    assert "1 prompt skipped: the judge named neither response" in done.stdout
    assert len(pairs()) == 3


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge-model", "m"], "--judge-model goes with --judge endpoint"),
        (["--judge", "endpoint", "--judge-model", "m"], "needs --endpoint"),
        (["--judge", "endpoint", "--endpoint", "http://h"], "needs --judge-model"),
        (["--judge", "endpoint", "--endpoint", "h", "--judge-model", "m"], "no http or https"),
        (
            ["--judge=endpoint", "--endpoint=http://h", "--judge-model=m", "--key-variable=NO_KEY"],
            "variable NO_KEY holds no key",
        ),
        (["--temperature", "0"], "temperature = 0 draws the same"),
        (["--top-p", "2"], "top_p = 2"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_opened_or_written(
    arguments: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        call(*arguments)
    assert not Path("out.jsonl").exists()


@pytest.mark.usefixtures("folder")
def test_help_does_not_offer_the_temperature_that_is_refused() -> None:
    shown = " ".join(CliRunner().invoke(prefer, ["--help"]).stdout.split())
    start = shown.index("--temperature")
    about = shown[start : shown.index("--top-k")]
    assert "Above 0" in about
    assert "likeliest" not in about


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "edge_client.prefer.endpoint", raising=False)
    with pytest.raises(MissingExtraError, match=r"package httpx.*pip install 'pwff\[endpoint\]'"):
        call("--judge", "endpoint", "--endpoint", "http://h", "--judge-model", "m")


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pwff", "prefer", *arguments]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "honesty"], "'honesty' is not one of 'helpfulness', 'harmlessness'"),
        ([], "Missing option '--objective'"),
        (["--objective", "helpfulness", "--judge", "coin"], "'coin' is not one of"),
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        program("mini", "--out", "o.jsonl", *arguments), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.output = ""
        self.process = subprocess.Popen(
            arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        os.close(slave)

    def press(self, key: str) -> None:
        """Press a key as soon as the program waits for one: its terminal passes keys on at once."""
        for _ in range(int(WAIT_SECONDS / 0.02)):
            self._read(0.02)
            if not termios.tcgetattr(self._master)[3] & termios.ICANON:
                os.write(self._master, key.encode())
                while not termios.tcgetattr(self._master)[3] & termios.ICANON:
                    self._read(0.02)
                return
        raise TimeoutError(self.output)

    def wait(self) -> int:
        """Return the exit code."""
        while self._read(WAIT_SECONDS):
            pass
        return self.process.wait(WAIT_SECONDS)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            self.output += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the program has ended
            return False
        return True

    def close(self) -> None:
        """End the program if it has not ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(WAIT_SECONDS)
        os.close(self._master)


@contextmanager
def on_terminal(*arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(program(*arguments))
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.slow
def test_on_a_terminal_a_key_is_enough_and_ctrl_c_saves_everything(
    tiny_checkpoint: Path, folder: Path
) -> None:
    arguments = [
        str(tiny_checkpoint), "--objective", "helpfulness", "--out", "out.jsonl",
        "--prompts", "prompts.txt", "--max-tokens", "8", "--threads", "1", "--temperature", "1.5",
    ]  # fmt: skip
    with on_terminal(*arguments) as terminal:
        terminal.press("1")
        terminal.press("2")
        terminal.press("\x03")
        assert terminal.wait() == 130
    assert "2 pairs added, 2 in out.jsonl (interrupted)" in terminal.output
    assert "3 of 4" in terminal.output
    assert "Traceback" not in terminal.output
    kept = load_preferences(str(folder / "out.jsonl"), "helpfulness").pairs
    assert len(kept) == 2
    with on_terminal(*arguments) as terminal:
        terminal.press("s")
        terminal.press("1")
        assert terminal.wait() == 0
    pairs = load_preferences(str(folder / "out.jsonl"), "helpfulness").pairs
    assert (pairs[:2], len(pairs)) == (kept, 3)
