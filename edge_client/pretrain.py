"""Training a small GPT-2 base from text: how the bundled ``mini`` was made.

A recipe (TOML) names shape, corpus, steps and seed. The corpus is the kit's training part, as plain
prose without any prompt template, and text files. Interrupted, it goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from device_profiles.config_files import Config, load
from device_profiles.errors import InputError
from device_profiles.seeds import number, stream
from edge_client.data.instructions import KIT, Example, load_instructions

END = "<|endoftext|>"
CHECKPOINT_STEPS = 100
_WEIGHTS = "model.safetensors"


class Recipe(Config):
    """What is trained on what, for how long.

    ``kit_passes`` and ``text_passes`` say how often the kit's training part and the text files are
    in one pass over the corpus; ``steps`` of ``batch_size`` windows of ``positions`` tokens follow.
    """

    layers: Annotated[int, Field(ge=1, le=96)]
    width: Annotated[int, Field(ge=8, le=8192)]
    heads: Annotated[int, Field(ge=1, le=128)]
    positions: Annotated[int, Field(ge=16, le=8192)]
    vocabulary: Annotated[int, Field(ge=300, le=200_000)]
    kit_passes: Annotated[int, Field(ge=0, le=1000)]
    text_passes: Annotated[int, Field(ge=0, le=1000)]
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on, and the kit's held-out part to measure on."""

    documents: list[str]
    held_out: list[str]
    sources: list[dict[str, str]]


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in a TOML file.

    Raises:
        InputError: If it is missing or a value is out of bounds.
    """
    recipe = load(Recipe, path)
    if recipe.width % recipe.heads:
        raise InputError(f"{path}: width {recipe.width} is no multiple of heads {recipe.heads}")
    return recipe


def as_prose(example: Example) -> str:
    """Return an example as plain text, without a template."""
    return "\n".join(part for part in (example.instruction, example.input, example.output) if part)


def read_corpus(recipe: Recipe, texts: list[Path]) -> Corpus:
    """Return the training documents, repeated as the recipe says, and the held-out ones.

    Raises:
        InputError: If a text file cannot be read, or nothing is left to train on.
    """
    kit = load_instructions(KIT)
    train = [as_prose(e) for e in kit.examples if e.split == "train"]
    documents = train * recipe.kit_passes
    sources = []
    if recipe.kit_passes:
        sources.append({"name": "kit, training part", "sha256": _sha256("\n".join(train))})
    for path in texts if recipe.text_passes else []:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"text file {path} cannot be read as UTF-8: {err}") from err
        documents += [text] * recipe.text_passes
        sources.append({"name": path.name, "sha256": _sha256(text)})
    if not any(documents):
        raise InputError(
            f"the corpus is empty (kit_passes = {recipe.kit_passes}, text_passes = "
            f"{recipe.text_passes}, {len(texts)} text files); raise kit_passes, or give --text FILE"
        )
    held_out = [as_prose(e) for e in kit.examples if e.split == "held_out"]
    return Corpus(documents=documents, held_out=held_out, sources=sources)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(corpus: Corpus, vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer learnt from the corpus, each document once."""
    from tokenizers import (  # type: ignore[import-untyped]
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(dict.fromkeys(corpus.documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    )


def encode_documents(tokenizer: Any, documents: list[str]) -> npt.NDArray[np.int64]:
    """Return all documents as one row of tokens, each closed by the end token."""
    encoded: dict[str, list[int]] = {}
    for document in documents:
        if document not in encoded:
            encoded[document] = [*tokenizer(document).input_ids, tokenizer.eos_token_id]
    return np.concatenate([np.array(encoded[d], dtype=np.int64) for d in documents])


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to a tenth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def held_out_loss(model: Any, tokenizer: Any, documents: list[str]) -> tuple[float, float]:
    """Return the mean negative log-likelihood (nats) and accuracy of next tokens."""
    loss, right, count = 0.0, 0, 0
    for document in documents:
        ids = torch.tensor([[*tokenizer(document).input_ids, tokenizer.eos_token_id]])
        ids = ids[:, : model.config.n_positions]
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].float()
        target = ids[0, 1:]
        loss += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        right += int((logits.argmax(-1) == target).sum())
        count += target.numel()
    return loss / count, right / count


def checkpoint_step(out: Path) -> int:
    """Return the step from which ``pretrain`` would go on in ``out``; 0 without a checkpoint.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    return int(_checkpoint_notes(out).get("step", 0))


def pretrain(
    recipe: Recipe,
    texts: list[Path],
    out: Path,
    report: Callable[[int, float], None],
    *,
    checkpoint_steps: int = CHECKPOINT_STEPS,
) -> dict[str, Any]:
    """Train a base and write it to ``out`` as an fp16 checkpoint folder; return its figures.

    Args:
        recipe: What to train.
        texts: Text files of the corpus.
        out: Folder of the base; ``out/unfinished`` holds what is needed to go on.
        report: Called with the number of steps done and the loss of the last.
        checkpoint_steps: How many steps apart the checkpoints are, >= 1.

    Raises:
        InputError: If the corpus is shorter than one window, ``out`` already holds a base, or the
            checkpoint in it is damaged or of another recipe or corpus.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if (out / _WEIGHTS).exists():
        raise InputError(f"{out} already holds a {_WEIGHTS}; give another --out")
    corpus = read_corpus(recipe, texts)
    tokenizer = train_tokenizer(corpus, recipe.vocabulary)
    tokens = encode_documents(tokenizer, corpus.documents)
    windows = len(tokens) // recipe.positions
    if not windows:
        raise InputError(f"the corpus has {len(tokens)} tokens; one window is {recipe.positions}")
    torch.manual_seed(number(recipe.seed, "pretrain") % 2**32)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.positions,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=False,
        )
    )
    optimiser = _optimiser(model, recipe)
    binding = _binding(recipe, tokens)
    start = _resume(model, optimiser, out, binding)
    for step in range(start, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        batch = _window_batch(tokens, recipe, step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        report(step + 1, loss.item())
        if (step + 1) % checkpoint_steps == 0:
            _checkpoint(model, optimiser, out, {"step": str(step + 1), "binding": binding})
    return _finish(model, tokenizer, corpus, recipe, out)


def _window_batch(tokens: npt.NDArray[np.int64], recipe: Recipe, step: int) -> torch.Tensor:
    """Return seeded windows at any offset. Shape (B, T)."""
    starts = stream(recipe.seed, "window", step).integers(
        0, len(tokens) - recipe.positions + 1, size=recipe.batch_size
    )
    return torch.from_numpy(np.stack([tokens[s : s + recipe.positions] for s in starts]))


def _optimiser(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )


def _binding(recipe: Recipe, tokens: npt.NDArray[np.int64]) -> str:
    """Return the hash that ties a checkpoint to what it was trained on, and how."""
    return _sha256(recipe.model_dump_json() + hashlib.sha256(tokens.tobytes()).hexdigest())


def _checkpoint_path(out: Path) -> Path:
    return out / "unfinished" / "state.safetensors"


def _checkpoint(
    model: torch.nn.Module, optimiser: torch.optim.AdamW, out: Path, notes: dict[str, str]
) -> None:
    """Write weights, moments and notes; the old checkpoint goes once the new one is whole."""
    tensors = {f"p.{n}": p.detach() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state = optimiser.state[p]
        tensors[f"m.{name}"], tensors[f"v.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    path = _checkpoint_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name("new.safetensors")
    save_file(tensors, new, metadata=notes)
    new.replace(path)


def _checkpoint_notes(out: Path) -> dict[str, str]:
    path = _checkpoint_path(out)
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            notes: dict[str, str] = file.metadata()
    except (OSError, SafetensorError) as err:
        raise InputError(f"checkpoint {path} is damaged; remove it to begin anew") from err
    return notes


def _resume(model: torch.nn.Module, optimiser: torch.optim.AdamW, out: Path, binding: str) -> int:
    notes = _checkpoint_notes(out)
    if not notes:
        return 0
    if notes.get("binding") != binding:
        raise InputError(
            f"{_checkpoint_path(out)} is of another recipe or other texts; give those, another "
            "--out, or remove it to begin anew"
        )
    tensors, step = load_file(_checkpoint_path(out)), int(notes["step"])
    for name, p in model.named_parameters():
        p.data.copy_(tensors[f"p.{name}"])
        optimiser.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"m.{name}"],
            "exp_avg_sq": tensors[f"v.{name}"],
        }
    return step


def _finish(
    model: Any, tokenizer: Any, corpus: Corpus, recipe: Recipe, out: Path
) -> dict[str, Any]:
    """Round to fp16, measure what was rounded, and write the folder, the weights last."""
    model.half().float().eval()
    loss, accuracy = held_out_loss(model, tokenizer, corpus.held_out)
    new = out / "unfinished" / "base"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.half().save_pretrained(new, safe_serialization=True)
    tokenizer.save_pretrained(new)
    (new / "generation_config.json").unlink(missing_ok=True)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": recipe.steps,
        "tokens_seen": recipe.steps * recipe.batch_size * recipe.positions,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "held_out_loss": round(loss, 4),
        "held_out_accuracy": round(accuracy, 4),
        "corpus": corpus.sources,
        "recipe": recipe.model_dump(),
    }
    (new / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    for path in sorted(new.iterdir(), key=lambda path: path.name == _WEIGHTS):
        path.replace(out / path.name)
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    return figures
