"""Two different responses of the device's own model to one prompt."""

from __future__ import annotations

from pathlib import Path

from device_profiles.errors import InputError
from edge_client.data.prompt_files import Prompt
from edge_client.data.prompts import prompt as fill_template
from edge_client.inference.generation import Speaker, answer
from edge_client.inference.open_model import open_speaker
from edge_client.inference.sampling import Sampling

MOST_DRAWS = 6
LEAST_ROOM = 16  # tokens for an answer; with fewer there is nothing to judge


def open_candidate_model(
    model: Path, *, client: str | None, base: str | None, runtime: str, threads: int | None
) -> Speaker:
    """Return the model whose responses are to be ranked, ready to answer.

    Args:
        model: A run's folder, an exported one, or a base: ``mini``, a checkpoint folder, a hub id.
        client: Whose model of a run.
        base: Where the run's base is now, if not where the run found it.
        runtime: ``auto``, ``torch`` or ``onnx``.
        threads: Processor threads; by default as many as the runtime chooses.

    Raises:
        InputError: If there is no such model, client or base, or not for that runtime.
        HubUnavailableError: If it is a hub id and the hub does not answer.
        MissingExtraError: If the runtime is not installed.
    """
    bare = (model / "config.json").is_file() and not (model / "tokenizer.json").is_file()
    if model.is_dir() and not bare:
        return open_speaker(model, client=client, base=base, runtime=runtime, threads=threads)
    if client is not None or base is not None:
        raise InputError(f"{model} is a base and no run; leave --client and --base out")
    if runtime == "onnx":
        raise InputError(f"{model} is a base, which runs on torch; leave --runtime out")
    return _base_speaker(str(model), threads)


def _base_speaker(name: str, threads: int | None) -> Speaker:
    from edge_client.quiet import import_quietly
    from quantization.identity import identify

    identity = identify(name)
    import_quietly()
    from edge_client.inference.torch_model import TorchModel
    from quantization.base_model import load_base, set_threads

    if threads is not None:
        set_threads(threads)
    loaded = load_base(identity)
    tokenizer = loaded.tokenizer.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Speaker(
        model=TorchModel(loaded.model),
        tokenizer=tokenizer,
        end_tokens=frozenset([loaded.end_token]),
        title=f"{identity.name} on torch",
    )


def check_draws(sampling: Sampling) -> None:
    """Refuse a way of drawing that can only give the same response again.

    Raises:
        InputError: If the temperature is 0 or one token alone is left to choose from.
    """
    if sampling.temperature == 0 or sampling.top_k == 1:
        name, value = ("top_k", 1) if sampling.temperature else ("temperature", 0)
        raise InputError(
            f"{name} = {value} draws the same response every time, and a pair needs two; "
            "use a temperature above 0 and a top_k of 0 or above 1"
        )


def draw_candidates(speaker: Speaker, prompt: Prompt, sampling: Sampling) -> tuple[str, str] | None:
    """Return two responses that differ, or None where the model gave no two in ``MOST_DRAWS``.

    The draws are a function of the seed and the prompt, whatever was judged before: a session that
    goes on shows the same candidates. An empty response is drawn again, and so is one that differs
    from the first in spacing only.

    Raises:
        InputError: If the model is damaged.
        KeyboardInterrupt: At Ctrl-C.
    """
    asked = fill_template(prompt.instruction, prompt.input)
    found: list[str] = []
    for draw in range(MOST_DRAWS):
        given = answer(speaker, asked, sampling, words=("prefer", prompt.key, draw))
        if given.stopped == "interrupted":
            raise KeyboardInterrupt
        text = given.text.strip()
        if text and all(text.split() != other.split() for other in found):
            found.append(text)
        if len(found) == 2:
            return found[0], found[1]
    return None


def has_room(speaker: Speaker, prompt: Prompt) -> bool:
    """Return whether the prompt leaves the model at least ``LEAST_ROOM`` tokens to answer."""
    asked = speaker.tokenizer.encode(fill_template(prompt.instruction, prompt.input)).ids
    return len(asked) + LEAST_ROOM <= speaker.model.positions
