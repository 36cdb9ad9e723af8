"""Decoders that are no GPT-2: tuned on padded batches in whole runs, and what they have not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import load_experiment
from cloud_aggregator.records import RunRecord
from device_profiles.errors import InputError
from device_profiles.families import FAMILIES, GPT2
from device_profiles.modules import lora_sites
from edge_client.data.batches import make_batch
from edge_client.data.prompts import encode_example
from edge_client.export.personal import find_in_run
from edge_client.export.write import write_export
from edge_client.inference.generation import answer, draw_tokens
from edge_client.inference.open_model import open_speaker
from edge_client.inference.sampling import Sampling
from edge_client.peft.build import build_model
from edge_client.peft.tuned_model import TunedModel
from quantization.base_model import load_base
from quantization.errors import BaseModelError
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import BaseIdentity, identify
from tests.conftest import VOCABULARY, write_tokenizer
from tests.edge_client.conftest import EXAMPLES

OTHERS = [name for name in FAMILIES if name != GPT2]
LAYERS, WIDTH, INNER, HEADS, SHARED_HEADS, POSITIONS = 3, 16, 24, 4, 2, 128
#: Of adapters: 3 blocks of 3, each 2*16*4 + 4 + 16.
SHARED = 9 * 148


def a_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model with random weights."""
    from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = SHARED_HEADS
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt_neox": GPTNeoXConfig}
    return kinds[family](**{**sizes, **changes})


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a checkpoint with random weights and its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(a_config(family, **changes)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@dataclass(frozen=True)
class Done:
    """A run of two clients on a base."""

    record: RunRecord
    folder: Path
    base: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Return what does a run of two rounds on a tiny model of a family, once."""
    done: dict[str, Done] = {}
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Say {i}", "output": f"The number {i}."} for i in range(12)]
    data.write_text("\n".join(json.dumps(row) for row in rows))

    def make(family: str) -> Done:
        if family not in done:
            base = write_model(tmp_path_factory.mktemp(family), family)
            options = {
                "model": str(base), "data": str(data), "partition": "iid", "clients": 2,
                "rounds": 2, "local_steps": 6, "batch_size": 2, "learning_rate": 0.02,
                "max_length": 64, "adapter_size": 4, "lora_rank": 2, "placement": "wide",
                "transport": "memory",
            }  # fmt: skip
            folder = tmp_path_factory.mktemp("runs") / family
            done[family] = Done(emulate(load_experiment(None, options), folder), folder, base)
        return done[family]

    return make


@pytest.mark.parametrize("family", OTHERS)
def test_a_run_trains_uploads_and_measures(family: str, run: Callable[[str], Done]) -> None:
    record = run(family).record
    assert record.status == "done"
    assert [sorted(r.accepted) for r in record.rounds] == 2 * [[c.id for c in record.clients]]
    for client in record.clients:
        assert client.shared_parameters == SHARED
        assert (client.lora_count, client.precision) == (3 * LAYERS, "fp32")
        assert client.base_bytes == 4 * record.model.parameters
    assert record.summary.eval_loss_before is not None
    assert record.summary.eval_loss_after is not None
    assert record.summary.eval_loss_after < record.summary.eval_loss_before


@pytest.mark.parametrize("family", OTHERS)
def test_parameters_are_those_of_the_library(family: str, run: Callable[[str], Done]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(a_config(family))
    assert run(family).record.model.parameters == sum(p.numel() for p in model.parameters())


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = identify(str(write_model(tmp_path, "llama", tie_word_embeddings=True)))
    model = AutoModelForCausalLM.from_config(a_config("llama", tie_word_embeddings=True))
    assert base.parameters == sum(p.numel() for p in model.parameters())  # which ties them


@pytest.mark.parametrize("family", OTHERS)
def test_untrained_modules_leave_the_base_as_it_is_and_trained_ones_count(
    family: str, run: Callable[[str], Done]
) -> None:
    identity = identify(str(run(family).base))
    plain = load_base(identity)
    encoded = [encode_example(e, plain.tokenizer, 96) for e in EXAMPLES]
    batch = make_batch(encoded, plain.end_token)
    with torch.inference_mode():
        expected = plain.model(batch.tokens).logits[batch.places]
    model = build_model(
        identity, "fp32", adapter_size=4, placement="wide", lora_count=9, lora_rank=2
    )
    assert isinstance(model, TunedModel)
    zero = {n: np.zeros(tuple(p.shape), np.float32) for n, p in model.trainable().items()}
    model.put(zero)
    with torch.inference_mode():
        bare = model.logits_at(batch.tokens, batch.places)
    torch.testing.assert_close(bare, expected, atol=1e-5, rtol=1e-5)  # fp32, another order
    rng = np.random.default_rng(0)
    for (
        name,
        nothing,
    ) in zero.items():  # every tensor has its say: all others at random, this one zero or not
        full = {n: rng.normal(0, 0.3, t.shape).astype(np.float32) for n, t in zero.items()}
        results = []
        for values in (full[name], nothing):
            model.put({**full, name: values})
            with torch.inference_mode():
                results.append(model.logits_at(batch.tokens, batch.places))
        assert not torch.allclose(*results), name


@pytest.mark.parametrize("family", OTHERS)
def test_a_personal_model_generates_what_its_logits_say(
    family: str, run: Callable[[str], Done]
) -> None:
    done = run(family)
    client = done.record.clients[0].id
    speaker = open_speaker(done.folder, client=client)
    sampling = Sampling(temperature=0.0, max_tokens=5, repetition_penalty=1.0)
    assert answer(speaker, "Name a river.", sampling).tokens <= 5
    personal = find_in_run(done.folder, client)
    identity = personal.identity
    model = build_model(
        identity, "fp32", adapter_size=4, placement="wide", lora_count=9, lora_rank=2
    )
    assert isinstance(model, TunedModel)
    model.put(personal.tensors)
    tokens = list(model.base.tokenizer("Name a river.").input_ids)
    drawn = draw_tokens(speaker.model, list(tokens), sampling, ())
    for token in islice(drawn, 5):
        batch = torch.tensor([tokens])
        last = torch.zeros(batch.shape, dtype=torch.bool)
        last[0, -1] = True
        with torch.inference_mode():
            assert token == int(model.logits_at(batch, last).argmax())
        tokens.append(token)


def test_a_device_is_told_how_it_will_train(
    run: Callable[[str], Done], caplog: pytest.LogCaptureFixture
) -> None:
    identity = identify(str(run("llama").base))
    with caplog.at_level(logging.WARNING):
        build_model(identity, "fp32", adapter_size=4, placement="qkv", lora_count=9, lora_rank=2)
    assert "is a Llama: it trains on padded batches by transformers and peft" in caplog.text


# -- what they have not ----------------------------------------------------------------------------


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as told:
        action()
    assert told.value.exit_code == 2
    return str(told.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "precision = 'int8' needs a GPT-2"),
        ({"stages": "instruction,reward"}, "stages = 'instruction,reward' needs a GPT-2"),
    ],
)
def test_a_run_that_needs_a_gpt2_is_refused_before_it_starts(
    options: dict[str, str], words: str, run: Callable[[str], Done], tmp_path: Path
) -> None:
    given = {"model": str(run("qwen2").base), "transport": "memory", "clients": 2, **options}
    said = refusal(lambda: emulate(load_experiment(None, given), tmp_path / "run"))
    assert words in said
    assert "is a Qwen2, which is tuned by instructions in fp32 and generates, and no more" in said
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_packed_step_and_export_say_that_they_need_a_gpt2(
    run: Callable[[str], Done], tmp_path: Path
) -> None:
    done = run("gpt_neox")
    identity = identify(str(done.base))
    assert "a packed step on frozen weights needs a GPT-2" in refusal(lambda: load_frozen(identity))
    personal = find_in_run(done.folder, done.record.clients[0].id)
    for form in ("hf", "onnx"):
        said = refusal(
            lambda form=form: write_export(personal, tmp_path / "out", form=form, precision="fp32")
        )
        assert "pwff export needs a GPT-2, and" in said
    assert not (tmp_path / "out").exists()


def test_joint_projections_have_no_places_for_query_key_and_value(
    run: Callable[[str], Done],
) -> None:
    shape = identify(str(run("gpt_neox").base)).shape
    said = refusal(lambda: lora_sites(shape, "qkv"))
    assert said == "LoRA placement 'qkv' has no sites on GPT-NeoX; choose wide"


def test_keys_and_values_are_as_wide_as_the_heads_that_share_them(tmp_path: Path) -> None:
    shape = identify(str(write_model(tmp_path, "llama"))).shape
    sizes = {site.path.rsplit(".", 1)[1]: site.outputs for site in lora_sites(shape, "qkv")}
    assert sizes == {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2}


def changed(folder: Path, **values: Any) -> BaseIdentity:
    """Change a configuration and look at the base again."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return identify(str(folder))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mamba"}, "holds a 'mamba'; this version tunes GPT-2 ('gpt2')"),
        ({"head_dim": 8}, "4 heads of 8 make 32, and the width is 16"),
        ({"num_attention_heads": None}, "num_attention_heads = None; a whole number"),
        ({"intermediate_size": "x"}, "intermediate_size = 'x'; a whole number"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_model(tmp_path, "llama")
    with pytest.raises(BaseModelError) as told:
        changed(tmp_path, **values)
    assert words in str(told.value)
