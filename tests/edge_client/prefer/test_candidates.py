"""Two candidates: different, repeatable, and of the model that was named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from device_profiles.errors import InputError
from edge_client.data.prompt_files import Prompt
from edge_client.inference.generation import Speaker
from edge_client.inference.sampling import Sampling
from edge_client.prefer.candidates import (
    check_draws,
    draw_candidates,
    has_room,
    open_candidate_model,
)
from quantization.identity import BaseIdentity
from tests.edge_client.export.conftest import CLIENT, write_run
from tests.edge_client.inference.conftest import a_speaker
from tests.edge_client.prefer.conftest import a_babbler

PROMPT = Prompt(instruction="Say something.")
PLAIN = Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0)


def open_(model: Path | str, **changes: Any) -> Speaker:
    wish = {"client": None, "base": None, "runtime": "auto", "threads": 1, **changes}
    return open_candidate_model(Path(model), **wish)


def test_candidates_differ_and_are_a_function_of_seed_and_prompt_alone() -> None:
    speaker = a_babbler()
    drawn = draw_candidates(speaker, PROMPT, PLAIN)
    assert drawn is not None
    assert drawn[0] != drawn[1]
    assert all(len(text) == 8 and set(text) <= set("abcdefgh") for text in drawn)
    other = draw_candidates(speaker, Prompt(instruction="Another."), PLAIN)
    assert draw_candidates(a_babbler(), PROMPT, PLAIN) == drawn  # whatever came before
    assert other != drawn
    assert draw_candidates(speaker, PROMPT, PLAIN.model_copy(update={"seed": 1})) != drawn


def test_equal_candidates_are_drawn_again() -> None:
    # Of two words of one letter, the second draw equals the first every other time.
    speaker = a_babbler("ab", length=1)
    prompts = [Prompt(instruction=f"Ask {i}.") for i in range(200)]
    drawn = [draw_candidates(speaker, prompt, PLAIN) for prompt in prompts]
    assert {pair for pair in drawn if pair} == {("a", "b"), ("b", "a")}
    # Six equal letters in a row: 1 of 32, so 6.25 of 200, deviation 2.5; four of them are 10.
    # With two draws alone it would be 100.
    assert drawn.count(None) <= 16


def test_a_model_that_says_one_thing_has_no_two_candidates() -> None:
    assert draw_candidates(a_speaker("yes"), PROMPT, PLAIN) is None


@pytest.mark.parametrize("silence", ["", "  \n"])
def test_silence_is_no_candidate(silence: str) -> None:
    assert draw_candidates(a_speaker(silence), PROMPT, PLAIN) is None


def test_ctrl_c_while_a_candidate_is_drawn_is_not_taken_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speaker = a_babbler()

    def interrupted(_tokens: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(speaker.model, "feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_candidates(speaker, PROMPT, PLAIN)


def test_a_prompt_needs_room_for_sixteen_tokens_of_answer() -> None:
    # A token is a byte here: the template without instruction, then the instruction.
    template = len(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n\n\n### Response:\n"
    )
    fits = 2048 - 16 - template
    speaker = a_babbler()
    assert has_room(speaker, Prompt(instruction="x" * fits))
    assert not has_room(speaker, Prompt(instruction="x" * (fits + 1)))


@pytest.mark.parametrize(("field", "value"), [("temperature", 0), ("top_k", 1)])
def test_draws_that_cannot_differ_are_refused(field: str, value: int) -> None:
    check_draws(PLAIN)
    with pytest.raises(InputError, match=f"{field} = {value} draws the same response"):
        check_draws(PLAIN.model_copy(update={field: value}))


def test_a_base_is_opened_by_its_folder_with_or_without_a_tokenizer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = PLAIN.model_copy(update={"max_tokens": 8})
    drawn = draw_candidates(open_(tiny_checkpoint), PROMPT, short)
    assert drawn is not None
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    # Its place is taken by the kit's, here by the same one: the candidates are the same.
    monkeypatch.setattr("quantization.identity.mini_folder", lambda: tiny_checkpoint)
    assert draw_candidates(open_(bare), PROMPT, short) == drawn


def test_of_a_run_it_is_the_clients_own_model_that_answers(
    tiny_checkpoint: Path, identity: BaseIdentity, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", identity, "pwff", "qkv")
    speaker = open_(run, client=CLIENT)
    assert speaker.title == f"{CLIENT} of trial after round 3, on torch"
    short = PLAIN.model_copy(update={"max_tokens": 8})
    own = draw_candidates(speaker, PROMPT, short)
    assert own is not None
    assert own != draw_candidates(open_(tiny_checkpoint), PROMPT, short)
    with pytest.raises(InputError, match="name one with --client"):
        open_(run)


def test_what_does_not_go_with_a_base_is_refused() -> None:
    with pytest.raises(InputError, match="mini is a base and no run; leave --client"):
        open_("mini", client="pi5-01")
    with pytest.raises(InputError, match="mini is a base, which runs on torch"):
        open_("mini", runtime="onnx")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an exported model nor a run"):
        open_(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_(tmp_path / "nowhere")
