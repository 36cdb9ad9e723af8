"""A small encoder with random weights, on disk."""

from __future__ import annotations

import string
from pathlib import Path

import torch

WORDS = ["the", "a", "number", "river", "bridge", "name", "is", "of", "four", "three", "good"]
LETTERS = [c for c in string.printable if not c.isspace() and not c.isupper() and c != "a"]
WIDTH = 8


def write_encoder(
    folder: Path, *, positions: int = 16, letters: bool = False, seed: int = 2
) -> Path:
    """Write a BERT with random weights and a tokenizer that knows a few words.

    Args:
        folder: It is made.
        positions: Longest text, tokens.
        letters: Whether the tokenizer knows every word by its letters.
        seed: Of the weights.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [*marks, *WORDS]
    if letters:
        known += [*LETTERS, "##a", *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(known))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder
