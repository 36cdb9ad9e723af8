"""Write a personal model as a folder that others can load, and see that it is the trained one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.modules import adapter_sites
from edge_client.data.prompts import prompt
from edge_client.export.card import write_card
from edge_client.export.folder import MARK, check_place, new_folder, size_of
from edge_client.export.personal import Personal
from quantization.errors import MissingExtraError
from quantization.identity import require_gpt2
from quantization.tokenizer import transformers_tokenizer

if TYPE_CHECKING:
    from edge_client.export.check import Check
    from edge_client.inference.generation import LanguageModel
    from quantization.base_model import Base

FORMATS = {"hf": ("fp32",), "onnx": ("fp32", "int8")}
_NEEDED = {
    "edge": ("torch", "transformers", "peft"),
    "onnx": ("onnx", "onnxruntime", "optimum.exporters.onnx"),
}
_PACKAGES = {"optimum.exporters.onnx": "optimum-onnx"}
_MODELLING = "modeling_pwff.py"

Notify = Callable[[str], None]


class ExportFailedError(Exception):
    """What was written does not compute what was trained."""

    exit_code = 1


def check_wish(form: str, precision: str, out: Path, *, force: bool) -> None:
    """See that an export can be made, before any work.

    Raises:
        InputError: If format or precision is unknown, or ``out`` may not be replaced.
        MissingExtraError: If its packages are not installed.
    """
    choose("format", form, FORMATS)
    if precision not in FORMATS[form]:
        raise InputError(
            f"precision '{precision}' with format '{form}', which is written in "
            f"{' or '.join(FORMATS[form])}; int8 is for --format onnx"
        )
    check_place(out, force=force)
    for extra in ("edge", "onnx") if form == "onnx" else ("edge",):
        for module in _NEEDED[extra]:
            if not _is_there(module):
                raise MissingExtraError(
                    f"--format {form} needs {_PACKAGES.get(module, module)}, which is not "
                    "installed: "
                    f"`pip install 'pwff[{extra}]'`"
                )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it is in
        return False


def write_export(
    personal: Personal,
    out: Path,
    *,
    form: str,
    precision: str,
    force: bool = False,
    notify: Notify = lambda _doing: None,
) -> dict[str, Any]:
    """Write a personal model to a new folder, check it, and return what ``export.json`` says.

    Args:
        personal: What to write.
        out: The new folder.
        form: ``hf`` or ``onnx``.
        precision: ``fp32``, or ``int8`` for ``onnx``.
        force: Replace an earlier export.
        notify: Told what is being done.

    Raises:
        ExportFailedError: If an fp32 export does not compute what was trained.
        InputError: If the folder cannot be written, or the base is damaged or too large.
    """
    from edge_client.export.check import compare, held_out_text, trained_logits
    from edge_client.export.merge import merged_model
    from quantization.base_model import load_base

    require_gpt2(personal.identity, "pwff export")
    notify("loading the base")
    base = load_base(personal.identity)
    text = held_out_text(personal, base.tokenizer)
    notify(f"reading {text.words} with the trained model")
    trained = trained_logits(personal, text.examples)
    model = merged_model(personal, base)
    with new_folder(out, force=force) as folder:
        notify(f"writing {form} {precision}")
        written = _write(form, precision, model, base, folder)
        notify("comparing it with the trained model")
        check = compare(written, text, trained)
        if precision == "fp32" and not check.same:
            raise ExportFailedError(
                f"the {form} export's logits differ from the trained model's by "
                f"{check.largest_difference:.2g} (largest logit {check.largest_logit:.3g}); "
                "nothing was written"
            )
        report = _report(personal, form, precision, check)
        (folder / MARK).write_text(json.dumps(report, indent=1) + "\n")
        card = write_card(
            report,
            folder=out.name,
            template=prompt("{instruction}"),
            end_token=base.tokenizer.eos_token,
        )
        (folder / "README.md").write_text(card)
        size = size_of(folder)
    return {**report, "folder": str(out), "bytes": size}


def _write(form: str, precision: str, model: Any, base: Base, folder: Path) -> LanguageModel:
    """Write model and tokenizer, and return what was written, loaded again."""
    _write_tokenizer(base, folder)
    if form == "onnx":
        from quantization.onnx_export import export_onnx
        from quantization.onnx_runtime import FILE, OnnxModel

        base.model.config.save_pretrained(folder)  # the adapters are in the graph
        model.generation_config.save_pretrained(folder)
        export_onnx(model, folder / FILE, precision)
        return OnnxModel(folder)
    from edge_client.inference.torch_model import load_torch_model

    if model is not base.model:
        model.config.auto_map = {
            "AutoConfig": "modeling_pwff.PwffGPT2Config",
            "AutoModelForCausalLM": "modeling_pwff.PwffGPT2LMHeadModel",
        }
        source = resources.files("quantization") / "hf" / _MODELLING
        (folder / _MODELLING).write_bytes(source.read_bytes())
    try:
        model.save_pretrained(folder)
    except SafetensorError as err:  # of a full disk, say, which is told as all other writing is
        raise OSError(str(err)) from err
    return load_torch_model(folder, model.config.model_type)


def _write_tokenizer(base: Base, folder: Path) -> None:
    """Write the tokenizer; whoever loads it gets from it only what a GPT-2 reads.

    A tokenizer of no particular class gives token types as well, and transformers' GPT-2 adds the
    embeddings of token 0 for them.
    """
    transformers_tokenizer(base.identity.tokenizer_folder).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["model_max_length"] = base.identity.positions
    path.write_text(json.dumps(config, indent=1) + "\n")


def _report(personal: Personal, form: str, precision: str, check: Check) -> dict[str, Any]:
    identity = personal.identity
    adapters = len(adapter_sites(identity.shape)) if personal.adapter_size else 0
    return {
        "schema": 1,
        "version": version("pwff"),
        "format": form,
        "precision": precision,
        "client": personal.client,
        "run": personal.run,
        "method": personal.method,
        "round": personal.round,
        "trained_precision": personal.precision,
        "base": {
            "name": identity.name,
            "parameters": identity.parameters,
            "sha256": identity.sha256,
            "tokenizer_sha256": identity.tokenizer_sha256,
        },
        "modules": {
            "adapters": adapters,
            "adapter_size": personal.adapter_size,
            "lora": personal.lora_count,
            "lora_rank": personal.lora_rank,
            "placement": personal.placement,
        },
        "check": asdict(check),
    }
