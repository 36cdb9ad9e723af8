"""The model card of an exported folder: what it is, how to load it, whose it is."""

from __future__ import annotations

from typing import Any

_HEAD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [pwff, personal, gpt2]
---

# A personal model of `{client}`

A language model that was tuned by federated learning with PWFF{origin}.
It answers one instruction at a time, in the template below, and remembers nothing of the last.

**It is personal.** It holds what was learnt from one user's own text and may repeat pieces of it.
Do not publish it, and pass it on only if that user agrees.

| | |
|---|---|
| base | `{base}` ({parameters:,} parameters, SHA-256 `{sha256:.16}`) |
| modules | {modules} |
| format | {form} |
| checked | {check} |

## Use

    pwff chat {folder}
    pwff generate {folder} --prompt "Name three rivers."

"""

_PLAIN = """\
Or with transformers (4.57 or newer):

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{folder}")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")

"""

_ADAPTED = """\
Or with transformers (4.57 or newer). The adapters are not linear, so they stay modules of their
own, which `modeling_pwff.py` in this folder defines; read it, then allow it:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)

"""

_ONNX = """\
Or with optimum-onnx; the adapters are in the graph:

    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained("{folder}")

"""

_TAIL = """\
## Prompt

It was trained on this template, and answers well in no other:

    {template}

An answer ends with the token {end_token}.

## Licence

The weights are those of the base `{base}`, changed by training: whatever the licence of the base
says of changed versions holds for them. The code that PWFF put here is under Apache-2.0.
"""


def write_card(report: dict[str, Any], *, folder: str, template: str, end_token: str) -> str:
    """Return README.md from what ``export.json`` holds.

    Args:
        report: Without folder and size.
        folder: Name of the exported folder.
        template: The prompt of an instruction, placeholders in braces.
        end_token: As the tokenizer writes it.
    """
    base, modules, check = report["base"], report["modules"], report["check"]
    run = f" in the run `{report['run']}`" if report["run"] else ""
    method = f" by the method `{report['method']}`" if report["method"] else ""
    adapted = modules["adapters"] > 0
    form = f"{'ONNX' if report['format'] == 'onnx' else 'safetensors'}, {report['precision']}"
    if report["trained_precision"] not in ("", "fp32"):
        form += f" (the base was held in {report['trained_precision']} when it was trained)"
    facts = {
        "library": "optimum" if report["format"] == "onnx" else "transformers",
        "client": report["client"],
        "origin": f"{run}{method}, as it was after round {report['round']}",
        "base": base["name"],
        "parameters": base["parameters"],
        "sha256": base["sha256"],
        "modules": _describe(modules),
        "form": form,
        "check": (
            f"on {check['tokens']} tokens of {check['text']}: {check['agreement']:.1%} of the next "
            "tokens are the trained model's, its logits differ by at most "
            f"{check['largest_difference']:.1g} (the largest is {check['largest_logit']:.3g})"
        ),
        "folder": folder,
        "template": template.rstrip("\n").replace("\n", "\n    "),
        "end_token": f"`{end_token}`",
    }
    load = _ONNX if report["format"] == "onnx" else _ADAPTED if adapted else _PLAIN
    return (_HEAD + load + _TAIL).format(**facts)


def _describe(modules: dict[str, Any]) -> str:
    parts = []
    if modules["adapters"]:
        parts.append(f"{modules['adapters']} bottleneck adapters of size {modules['adapter_size']}")
    if modules["lora"]:
        parts.append(f"{modules['lora']} LoRA modules of rank {modules['lora_rank']}, merged")
    return " and ".join(parts)
