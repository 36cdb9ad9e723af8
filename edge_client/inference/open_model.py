"""What a person names, as something to talk to: an exported folder, or a run and a client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.families import GPT2
from edge_client.inference.generation import LanguageModel, Speaker
from edge_client.quiet import import_quietly
from quantization.errors import BaseModelError, MissingExtraError
from quantization.onnx_runtime import FILE, OnnxModel

RUNTIMES = ("auto", "torch", "onnx")
_TORCH_FILE = "model.safetensors"
_ANSWERED = {"torch": "--format hf", "onnx": "--format onnx"}


def open_speaker(
    model: Path,
    *,
    client: str | None = None,
    base: str | None = None,
    runtime: str = "auto",
    threads: int | None = None,
) -> Speaker:
    """Return the model in a folder, ready to answer.

    Args:
        model: An exported folder, or a run's.
        client: Whose model of a run.
        base: Where the run's base is now, if not where the run found it.
        runtime: ``auto``, ``torch`` or ``onnx``.
        threads: Processor threads; by default as many as the runtime chooses.

    Raises:
        InputError: If the folder holds no model, or none for that runtime or client.
        MissingExtraError: If the runtime is not installed.
    """
    choose("runtime", runtime, RUNTIMES)
    if (model / "run.json").is_file():
        return _from_run(model, client, base, runtime, threads)
    kinds = [k for k, f in (("onnx", FILE), ("torch", _TORCH_FILE)) if (model / f).is_file()]
    if not kinds:
        raise InputError(
            f"{model} holds neither an exported model nor a run; make one with "
            "pwff export RUN --client ID"
        )
    if client is not None or base is not None:
        raise InputError(f"{model} is an exported model; leave --client and --base out")
    kind = kinds[0] if runtime == "auto" else runtime
    if kind not in kinds:
        raise InputError(
            f"{model} does not run on {kind}: it was exported for {kinds[0]}; leave --runtime out, "
            f"or export with {_ANSWERED[kind]}"
        )
    config = _read_json(model / "config.json")
    if kind == "onnx":
        loaded: LanguageModel = OnnxModel(model, threads)
    else:
        _require_torch(threads)
        from edge_client.inference.torch_model import load_torch_model

        loaded = load_torch_model(model, str(config.get("model_type")))
    return Speaker(
        model=loaded,
        tokenizer=_read_tokenizer(model / "tokenizer.json"),
        end_tokens=_end_tokens(model, config),
        title=f"{model.resolve().name} on {loaded.name}",
    )


def _from_run(
    run: Path, client: str | None, base: str | None, runtime: str, threads: int | None
) -> Speaker:
    if client is None:
        raise InputError(f"{run} is a run with many models; name one with --client ID")
    if runtime == "onnx":
        raise InputError(
            "the model of a run is put together in torch; for ONNX Runtime, export it first: "
            f"pwff export {run} --client {client} --format onnx"
        )
    from edge_client.export.personal import find_in_run

    personal = find_in_run(run, client, base)
    _require_torch(threads)
    from edge_client.export.merge import merged_model, plain_model
    from edge_client.inference.torch_model import TorchModel
    from quantization.base_model import load_base

    loaded, identity = load_base(personal.identity), personal.identity
    put_together = merged_model if identity.shape.family == GPT2 else plain_model
    return Speaker(
        model=TorchModel(put_together(personal, loaded), identity.positions),
        tokenizer=_plain(loaded.tokenizer.backend_tokenizer),
        end_tokens=frozenset([loaded.end_token]),
        title=f"{client} of {personal.run} after round {personal.round}, on torch",
    )


def _require_torch(threads: int | None) -> None:
    try:
        import_quietly()
        import torch
    except ImportError as err:
        raise MissingExtraError(
            f"this model runs on torch, and {err.name} is not installed: "
            "`pip install 'pwff[edge]'`, or export it with --format onnx"
        ) from err
    if threads is not None:
        torch.set_num_threads(threads)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as err:
        raise BaseModelError(f"{path} cannot be read; export the model again") from err


def _end_tokens(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    path = folder / "generation_config.json"
    found = _read_json(path).get("eos_token_id") if path.is_file() else None
    found = config.get("eos_token_id") if found is None else found
    tokens = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise BaseModelError(f"{folder} names no end token (eos_token_id); export it again")
    return frozenset(tokens)


def _read_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer  # type: ignore[import-untyped]
    except ImportError as err:
        raise MissingExtraError(
            "text becomes tokens by the package tokenizers, which is not installed: "
            "`pip install tokenizers` (it comes with 'pwff[edge]')"
        ) from err
    try:
        return _plain(Tokenizer.from_file(str(path)))
    except Exception as err:  # the library raises a bare one
        raise BaseModelError(f"{path} cannot be read ({err}); export the model again") from err


def _plain(tokenizer: Any) -> Any:
    """Return a tokenizer that neither cuts nor pads."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
