"""What runs on this machine, found out by running it: kernels forward and backward, a base, ONNX.

Each kernel is held against float64 on the CPU. Trials run in a process of their own: a kernel that
was built for another processor raises nothing, it kills.
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
from device_profiles.seeds import stream
from edge_client.data.instructions import KIT, load_instructions
from quantization.identity import MINI, identify

_ROWS, _INPUTS, _OUTPUTS = 8, 64, 48
#: Relative error of a product or gradient at most; a GPU may multiply fp32 as TF32.
ERRORS = {"fp32": 1e-3, "bf16": 0.02, "int8": 0.03, "nf4": 0.2}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_ADAPTER_SIZE, _LORA_COUNT = 10, 12
_BLIND_SHARE = 0.9  # a base that has learnt nothing loses about what a blind guess loses
_LEAVE_SECONDS = 5.0

Trial = Callable[[], str]


class AbsentError(Exception):
    """The device that a trial is about is not there."""


class WrongNumbersError(Exception):
    """It ran, and gave wrong numbers."""


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
            kind = "" if isinstance(err, WrongNumbersError) else f"{type(err).__name__}: "
            line = (str(err).strip().splitlines() or [""])[0][:200]
            outcome = Outcome(name=name, state="fails", words=f"{kind}{line}")
        send.send(outcome)


def relative_error(found: Any, expected: Any) -> float:
    """Return ||found - expected|| / ||expected||; any shape, not a number if ``found`` has one."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def try_kernel(precision: str, device: str) -> str:
    """Multiply by a frozen matrix at a precision, forward and backward to the input.

    Args:
        precision: ``fp32`` and ``bf16`` are torch's; ``int8`` and ``nf4`` are bitsandbytes'.
        device: ``cpu`` or ``cuda``.

    Raises:
        AbsentError: If there is no such device.
        WrongNumbersError: If product or gradient are off by more than ``ERRORS`` allows.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise AbsentError("torch sees no GPU")
    draw = stream(0, "trial").standard_normal
    x, weight = draw((_ROWS, _INPUTS)), draw((_OUTPUTS, _INPUTS)) / math.sqrt(_INPUTS)
    slope = draw((_ROWS, _OUTPUTS))  # of a loss, sum(slope * product)
    dtype = getattr(torch, _TORCH_NAMES.get(precision, "float32"))
    layer = _layer(precision, torch.tensor(weight, dtype=torch.float32)).to(device)
    if precision in _TORCH_NAMES:
        layer = layer.to(dtype)
    layer.requires_grad_(False)
    given = torch.tensor(x, dtype=dtype, device=device, requires_grad=True)
    product = layer(given)  # (rows, outputs)
    product.backward(torch.tensor(slope, dtype=product.dtype, device=device))
    if given.grad is None:
        raise WrongNumbersError("the gradient does not reach the input")
    errors = [
        relative_error(product.detach().float().cpu().numpy(), x @ weight.T),
        relative_error(given.grad.float().cpu().numpy(), slope @ weight),
    ]
    bound = ERRORS[precision]
    words = f"relative error of the product {errors[0]:.1e}, of the gradient {errors[1]:.1e}"
    if not all(error <= bound for error in errors):
        raise WrongNumbersError(f"wrong numbers: {words}, at most {bound:g}")
    where = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    return f"{where}: forward and backward run, {words}"


def _layer(precision: str, weight: Any) -> Any:
    """Return a linear layer without bias that holds ``weight`` (outputs, inputs), on the CPU."""
    import torch

    if precision in _TORCH_NAMES:
        layer: Any = torch.nn.Linear(_INPUTS, _OUTPUTS, bias=False)
    else:
        import bitsandbytes as bnb

        if precision == "int8":
            layer = bnb.nn.Linear8bitLt(_INPUTS, _OUTPUTS, bias=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(_INPUTS, _OUTPUTS, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    return layer


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
    if not error <= ERRORS["fp32"]:
        raise WrongNumbersError(f"wrong numbers: relative error {error:.1e}")
    return f"a GPT-2 is exported and runs in ONNX Runtime, relative error {error:.1e}"


#: By name: a precision and a device, or what else is tried.
TRIALS: dict[str, Trial] = {
    **{
        f"{precision} {device}": partial(try_kernel, precision, device)
        for precision in ERRORS
        for device in ("cpu", "cuda")
    },
    "base": partial(try_base, MINI),
    "onnx": try_onnx,
}
