"""Families of decoders: what their blocks and projections are called, and what LoRA may sit on.

GPT-2 has the packed step, quantised weights and export; the others are trained on padded batches
by transformers and peft. One row a family: a model is of the row that its ``model_type`` names.
"""

from __future__ import annotations

from dataclasses import dataclass

GPT2 = "gpt2"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of projection of a placement, with its sizes in terms of the base."""

    path: str
    inputs: str
    outputs: str


#: In the order in which they are filled, kind by kind, each from the top block down.
PLACEMENTS: dict[str, tuple[Kind, ...]] = {
    "qkv": (
        Kind(path="attn.c_attn.query", inputs="width", outputs="width"),
        Kind(path="attn.c_attn.value", inputs="width", outputs="width"),
        Kind(path="attn.c_attn.key", inputs="width", outputs="width"),
    ),
    "wide": (
        Kind(path="attn.c_attn", inputs="width", outputs="qkv"),
        Kind(path="mlp.c_fc", inputs="width", outputs="inner"),
        Kind(path="mlp.c_proj", inputs="inner", outputs="width"),
    ),
}

#: Llama's projections are apart, so its ``wide`` has the query where GPT-2 has all three.
_LLAMA: dict[str, tuple[Kind, ...]] = {
    "qkv": (
        Kind(path="self_attn.q_proj", inputs="width", outputs="width"),
        Kind(path="self_attn.v_proj", inputs="width", outputs="keys"),
        Kind(path="self_attn.k_proj", inputs="width", outputs="keys"),
    ),
    "wide": (
        Kind(path="self_attn.q_proj", inputs="width", outputs="width"),
        Kind(path="mlp.up_proj", inputs="width", outputs="inner"),
        Kind(path="mlp.down_proj", inputs="inner", outputs="width"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes:
        title: What a person calls it.
        blocks: Path of its list of blocks.
        attention: Name of a block's attention; its MLP is called ``mlp`` in all of them.
        placements: LoRA placements that it has sites for.
        layers: Key of the number of blocks in its config.json; and so the four after it.
    """

    title: str
    blocks: str
    attention: str
    placements: dict[str, tuple[Kind, ...]]
    layers: str = "num_hidden_layers"
    width: str = "hidden_size"
    inner: str = "intermediate_size"
    positions: str = "max_position_embeddings"
    heads: str = "num_attention_heads"


FAMILIES: dict[str, Family] = {
    GPT2: Family(
        title="GPT-2", blocks="transformer.h", attention="attn", placements=PLACEMENTS,
        layers="n_layer", width="n_embd", inner="n_inner", positions="n_positions", heads="n_head",
    ),
    "llama": Family(
        title="Llama", blocks="model.layers", attention="self_attn", placements=_LLAMA
    ),
    "qwen2": Family(
        title="Qwen2", blocks="model.layers", attention="self_attn", placements=_LLAMA
    ),
    "gpt_neox": Family(
        title="GPT-NeoX", blocks="gpt_neox.layers", attention="attention",
        placements={  # its joint projection is interleaved by head: query, key, value do not part
            "wide": (
                Kind(path="attention.query_key_value", inputs="width", outputs="qkv"),
                Kind(path="mlp.dense_h_to_4h", inputs="width", outputs="inner"),
                Kind(path="mlp.dense_4h_to_h", inputs="inner", outputs="width"),
            )
        },
    ),
}  # fmt: skip
