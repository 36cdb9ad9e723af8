"""What a run of the fault tests is built on: a base of a kilobyte, which nothing computes with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RUN = "faulty"
LAYERS, WIDTH = 4, 32
ADAPTER_SIZE, LORA_RANK, PLACEMENT = 4, 2, "qkv"
#: Twelve adapters of 2*32*4 + 32 + 4 = 292 parameters are 14,016 bytes in fp32, in pieces of 960.
CHUNK_BYTES = 1024
CHUNKS = 15


def write_base(folder: Path) -> Path:
    """Write what ``identify`` reads of a checkpoint, and no more; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_positions": 8, "vocab_size": 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}}))
    save_file({"wte.weight": np.zeros((1, WIDTH), np.float32)}, folder / "model.safetensors")
    return folder
