"""What runs on this machine, found out by running it: precisions of the base, a base, ONNX.

A precision runs if a backend holds a small matrix and multiplies by it both ways as float64 does
(``quantization.precision``). Trials run in a process of their own: a kernel that was built for
another processor raises nothing, it kills.
"""

from __future__ import annotations

import importlib
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from device_profiles.modules import lora_rank
from edge_client.data.instructions import KIT, load_instructions
from quantization.identity import MINI, identify

#: What may run on which device; the activations that int8-dynamic rounds are the CPU's.
TRIED_ON = {
    "fp32": ("cpu", "cuda"),
    "bf16": ("cpu", "cuda"),
    "int8": ("cpu", "cuda"),
    "int8-dynamic": ("cpu",),
    "nf4": ("cpu", "cuda"),
}
_ONNX_ERROR = 1e-3  # relative, of logits
_ADAPTER_SIZE, _LORA_COUNT = 10, 12
_BLIND_SHARE = 0.9  # a base that has learnt nothing loses about what a blind guess loses
_LEAVE_SECONDS = 5.0

Trial = Callable[[], str]


class AbsentError(Exception):
    """The device that a trial is about is not there."""


class WrongNumbersError(Exception):
    """It ran, and gave wrong numbers."""


class NoBackendError(Exception):
    """None of the backends of a precision runs; it says why each does not."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial gave; ``words`` are its figures, or say why it failed."""

    name: str
    state: Literal["works", "fails", "absent"]
    words: str


def try_out(
    names: Sequence[str], *, wait_seconds: float = 120.0, trials: Mapping[str, Trial] | None = None
) -> Iterator[Outcome]:
    """Run trials one after the other in a child process; yield what each gave.

    A trial that ends the process or takes too long has failed; the next begins in a new one.

    Args:
        names: Of ``trials``.
        wait_seconds: For each trial, the import of its packages included.
        trials: By default ``TRIALS``; must be picklable.
    """
    context = multiprocessing.get_context("spawn")
    left = list(names)
    while left:
        receive, send = context.Pipe(duplex=False)
        chosen = {name: (TRIALS if trials is None else trials)[name] for name in left}
        child = context.Process(target=_work, args=(chosen, send), daemon=True)
        child.start()
        send.close()
        try:
            while left and receive.poll(wait_seconds):
                outcome = receive.recv()
                left.pop(0)
                yield outcome
            words = f"no answer within {wait_seconds:g} s"
        except EOFError:
            child.join(_LEAVE_SECONDS)
            words = f"its process ended ({_how_it_ended(child.exitcode)})"
        finally:
            child.kill()
            child.join()
            child.close()
            receive.close()
        if left:
            yield Outcome(name=left.pop(0), state="fails", words=words)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _work(trials: Mapping[str, Trial], send: Connection) -> None:
    """Run trials in the child; whatever the packages print goes nowhere."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    for name, trial in trials.items():
        try:
            outcome = Outcome(name=name, state="works", words=trial())
        except AbsentError as err:
            outcome = Outcome(name=name, state="absent", words=str(err))
        except Exception as err:
            outcome = Outcome(name=name, state="fails", words=in_words(err))
        send.send(outcome)


def in_words(err: Exception) -> str:
    """Return the first line of an error, behind its name where that is not this module's."""
    told = isinstance(err, WrongNumbersError | NoBackendError)
    line = (str(err).strip().splitlines() or [""])[0][:200]
    return line if told else f"{type(err).__name__}: {line}"


def relative_error(found: Any, expected: Any) -> float:
    """Return ||found - expected|| / ||expected||; any shape, not a number if ``found`` has one."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def try_precision(precision: str, device: str) -> str:
    """Let the backends of a precision hold a matrix and multiply by it, forward and backward.

    Args:
        precision: Of ``quantization.precision.PRECISIONS``.
        device: ``cpu`` or ``cuda``.

    Raises:
        AbsentError: If there is no such device.
        NoBackendError: If no backend gives the right numbers.
    """
    import torch

    from quantization.precision import available

    if device == "cuda" and not torch.cuda.is_available():
        raise AbsentError("torch sees no GPU")
    found = available(device)[precision]
    if found.backend is None:
        raise NoBackendError(found.words)
    where = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    others = f" (not by {found.words})" if found.words else ""
    return f"{where}: forward and backward run by {found.backend}{others}"


def try_base(name: str) -> str:
    """Load a base, put adapters and LoRA modules on it, and go forward and backward once.

    Raises:
        WrongNumbersError: If it predicts held-out text of the kit no better than a blind guess, or
            a module gets no gradient.
    """
    import torch

    from edge_client.peft.tuned_model import TunedModel
    from quantization.base_model import load_base

    base = load_base(identify(name))
    shape = base.identity.shape
    lora_count = min(_LORA_COUNT, 3 * shape.layers)
    model = TunedModel(
        base,
        adapter_size=min(_ADAPTER_SIZE, shape.width),
        placement="qkv",
        lora_count=lora_count,
        lora_rank=lora_rank(shape, None)[0],
    )
    example = next(e for e in load_instructions(KIT).examples if e.split == "held_out")
    text = f"{example.instruction}\n{example.output}"
    tokens = torch.tensor([base.tokenizer(text).input_ids[: base.identity.positions]])  # (1, T)
    places = torch.ones_like(tokens, dtype=torch.bool)
    places[0, -1] = False
    logits = model.logits_at(tokens, places)  # (T - 1, V)
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    torch.autograd.backward(loss)
    blind = math.log(base.identity.vocabulary)
    words = f"{loss.item():.2f} nats a token on held-out text (a blind guess: {blind:.2f})"
    if not loss.item() < _BLIND_SHARE * blind:
        raise WrongNumbersError(f"it has not learnt to predict: {words}")
    without = [n for n, p in model.trainable().items() if p.grad is None]
    if without:
        raise WrongNumbersError(f"no gradient reaches {without[0]}")
    modules = f"{3 * shape.layers} adapters and {lora_count} LoRA modules"
    return f"forward and backward run with {modules} on; {words}"


def try_onnx() -> str:
    """Export a tiny GPT-2 to ONNX and hold ONNX Runtime's logits against torch's.

    Raises:
        WrongNumbersError: If they differ.
    """
    import onnxruntime
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(**shape, **ends)).eval()
    places = np.arange(12)[None]
    feed = {"input_ids": places, "position_ids": places, "attention_mask": np.ones_like(places)}
    with tempfile.TemporaryDirectory(prefix="pwff-onnx-") as folder:
        exporter = importlib.import_module("optimum.exporters.onnx")
        exporter.onnx_export_from_model(model, folder, task="text-generation", do_validation=False)
        session = onnxruntime.InferenceSession(
            Path(folder) / "model.onnx", providers=["CPUExecutionProvider"]
        )
        wanted = {entry.name for entry in session.get_inputs()}
        found = session.run(None, {k: v for k, v in feed.items() if k in wanted})[0]
    with torch.inference_mode():
        expected = model(torch.from_numpy(places)).logits.numpy()
    error = relative_error(found, expected)
    if not error <= _ONNX_ERROR:
        raise WrongNumbersError(f"wrong numbers: relative error {error:.1e}")
    return f"a GPT-2 is exported and runs in ONNX Runtime, relative error {error:.1e}"


#: By name: a precision and a device, or what else is tried.
TRIALS: dict[str, Trial] = {
    **{
        f"{precision} {device}": partial(try_precision, precision, device)
        for precision, devices in TRIED_ON.items()
        for device in devices
    },
    "base": partial(try_base, MINI),
    "onnx": try_onnx,
}
