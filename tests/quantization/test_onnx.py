"""The export to ONNX and the runtime of what it writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from quantization.errors import BaseModelError
from quantization.hf.modeling_pwff import PwffGPT2Config, PwffGPT2LMHeadModel
from quantization.onnx_export import export_onnx
from quantization.onnx_runtime import FILE, OnnxModel

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("optimum.onnxruntime", reason="the extra onnx is not installed")

WIDTH, VOCABULARY, BLOCKS = 32, 300, 2
TOKENS = [5, 17, 3, 88, 41, 2, 260, 7, 7, 12]


def a_model() -> Any:
    """Return a GPT-2 with adapters, none of whose weights is zero."""
    config = PwffGPT2Config(
        n_layer=BLOCKS, n_embd=WIDTH, n_head=4, n_positions=64, vocab_size=VOCABULARY,
        adapter_size=4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        made = PwffGPT2LMHeadModel(config).eval()
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of the same model in both precisions."""
    from transformers import GPT2Config

    folders = {}
    for precision in ("fp32", "int8"):
        folder = folders[precision] = tmp_path_factory.mktemp(precision)
        model = a_model()
        plain = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
        GPT2Config(**plain).save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        export_onnx(model, folder / FILE, precision)
    return folders


def expected_logits() -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = a_model()(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_fp32_logits_are_those_of_torch_however_the_text_is_cut(
    exported: dict[str, Path], cut: int
) -> None:
    model, expected = OnnxModel(exported["fp32"], threads=1), expected_logits()
    # rounding of fp32: logits reach about 3, and 1e-5 of that is a hundred roundings
    np.testing.assert_allclose(model.feed(TOKENS[:cut]), expected[cut - 1], rtol=0, atol=3e-5)
    for place in range(cut, len(TOKENS)):
        found = model.feed(TOKENS[place : place + 1])
        np.testing.assert_allclose(found, expected[place], rtol=0, atol=3e-5)


def test_a_reset_model_reads_as_a_new_one(exported: dict[str, Path]) -> None:
    model = OnnxModel(exported["fp32"], threads=1)
    first = model.feed(TOKENS)
    model.feed([1, 2, 3])
    model.reset()
    assert np.array_equal(model.feed(TOKENS), first)


def test_int8_logits_are_near_those_of_torch(exported: dict[str, Path]) -> None:
    model, expected = OnnxModel(exported["int8"], threads=1), expected_logits()
    found = np.stack([model.feed([token]) for token in TOKENS])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # A rounding to 255 steps over the range of a row is off by about 1/255 of its largest entry,
    # some 1 % of its norm; nine products one after the other stay below 5 %, and none is exact.
    assert 1e-4 < error < 0.05


def test_int8_looks_up_embeddings_to_half_a_step(exported: dict[str, Path]) -> None:
    import onnxruntime

    graph = onnx.load(exported["int8"] / FILE)
    (rows,) = [n.output[0] for n in graph.graph.node if "embedding/scale_column" in n.input]
    graph.graph.output.append(onnx.ValueInfoProto(name=rows))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    empty = np.zeros((1, 4, 0, WIDTH // 4), np.float32)
    ids = np.array([TOKENS])
    given = {
        "input_ids": ids, "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(len(TOKENS))[None],
    }  # fmt: skip
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past")}
    (found,) = session.run([rows], {**given, **past})
    table = a_model().get_input_embeddings().weight.detach().numpy()[TOKENS]
    # 255 steps from the least to the greatest entry of a row, zero among them
    steps = (table.max(-1).clip(0) - table.min(-1).clip(None, 0)) / 255
    assert np.all(np.abs(found[0] - table) <= 0.51 * steps[:, None])


@pytest.mark.parametrize(("precision", "bytes_an_entry"), [("fp32", 4), ("int8", 1)])
def test_the_token_table_is_in_the_file_once(
    exported: dict[str, Path], precision: str, bytes_an_entry: int
) -> None:
    graph = onnx.load(exported[precision] / FILE).graph
    tables = [i for i in graph.initializer if sorted(i.dims) == [WIDTH, VOCABULARY]]
    assert [len(i.raw_data) for i in tables] == [bytes_an_entry * WIDTH * VOCABULARY]


def test_int8_leaves_the_adapters_as_they_are(exported: dict[str, Path]) -> None:
    graph = onnx.load(exported["int8"] / FILE).graph
    kinds = [n.op_type for n in graph.node if "/adapter/" in n.name]
    assert kinds.count("MatMul") == BLOCKS * 3 * 2
    products = [n for n in graph.node if n.op_type == "MatMulInteger"]
    assert len(products) == BLOCKS * 4 + 1  # joint projection, output, two of the MLP; the head


def test_the_exported_file_passes_onnx_own_check(exported: dict[str, Path]) -> None:
    for folder in exported.values():
        onnx.checker.check_model(onnx.load(folder / FILE), full_check=True)


def test_optimum_generates_from_it_what_transformers_generates(exported: dict[str, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optimum's own imports
        from optimum.onnxruntime import ORTModelForCausalLM

        loaded = ORTModelForCausalLM.from_pretrained(exported["fp32"])
    ids = torch.tensor([TOKENS])
    asked: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "min_new_tokens": 16,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    expected = a_model().generate(ids, **asked)
    assert torch.equal(loaded.generate(ids, **asked), expected)


def test_a_base_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):  # the shape of GPT-2 XL: 1.6 G parameters
        model = PwffGPT2LMHeadModel(
            PwffGPT2Config(n_layer=48, n_embd=1600, n_head=25, adapter_size=10)
        )
    with pytest.raises(InputError, match="--format hf"):
        export_onnx(model, tmp_path / FILE, "fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_damaged_file_is_told(exported: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes((exported["fp32"] / "config.json").read_bytes())
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(BaseModelError, match="export it again"):
        OnnxModel(tmp_path)


def test_a_folder_without_a_gpt2_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 4}))
    with pytest.raises(BaseModelError, match=r"config\.json"):
        OnnxModel(tmp_path)
