"""What tests of several packages share: a tiny GPT-2 with a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

LAYERS, WIDTH, HEADS, POSITIONS, VOCABULARY = 12, 16, 2, 128, 512
END_OF_TEXT = "<|endoftext|>"

_TEXT = [
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n\n\n### Input:\n\n\n### Response:\n",
    "Name the number after three. The number after three is four.",
    "Say what a bridge is for. A bridge carries people over a river.",
]


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of at most ``VOCABULARY`` tokens; the end token is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(
        folder
    )


def write_checkpoint(
    folder: Path, *, layers: int = LAYERS, width: int = WIDTH, inner: int | None = None
) -> Path:
    """Write a GPT-2 with random weights, none of them zero, and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_inner=inner,
        n_head=HEADS,
        n_positions=POSITIONS,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():  # a bias of zero would hide a bias that is lost
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT-2 of 12 blocks and width 16; copy it before changing it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))
