"""Round trips: what is written computes and says what was trained, wherever it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from device_profiles.errors import InputError
from edge_client.data.prompts import prompt
from edge_client.export import merge
from edge_client.export.personal import Personal, find_in_run
from edge_client.export.write import ExportFailedError, check_wish, write_export
from edge_client.inference.generation import Speaker, answer
from edge_client.inference.open_model import open_speaker
from edge_client.inference.sampling import Sampling
from edge_client.inference.torch_model import TorchModel
from edge_client.peft.tuned_model import TunedModel
from quantization.base_model import load_base
from quantization.errors import MissingExtraError
from quantization.identity import BaseIdentity
from tests.edge_client.export.conftest import CLIENT, MakeRun, write_run

ASKED = prompt("Name the number after three.")
GREEDY = Sampling(temperature=0, repetition_penalty=1, max_tokens=24)


@pytest.fixture(scope="module", params=["pwff", "fedlora"])
def personal(
    request: pytest.FixtureRequest,
    identity: BaseIdentity,
    tmp_path_factory: pytest.TempPathFactory,
) -> Personal:
    """Return a client's model, with adapters and without."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return find_in_run(write_run(folder, identity, request.param, "qkv"), CLIENT)


@pytest.fixture(scope="module")
def trained(personal: Personal) -> Speaker:
    """Return the trained model, its modules apart, by transformers and peft."""
    base = load_base(personal.identity)
    model = TunedModel(
        base,
        adapter_size=personal.adapter_size,
        placement=personal.placement,
        lora_count=personal.lora_count,
        lora_rank=personal.lora_rank,
    )
    model.put(personal.tensors)
    return Speaker(
        model=TorchModel(model.model),
        tokenizer=base.tokenizer.backend_tokenizer,
        end_tokens=frozenset([base.end_token]),
        title="trained",
    )


@pytest.fixture(scope="module")
def hf(personal: Personal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return its export for transformers."""
    out = tmp_path_factory.mktemp("hf") / "out"
    write_export(personal, out, form="hf", precision="fp32")
    return out


@pytest.fixture(scope="module", params=["fp32", "int8"])
def onnx(
    request: pytest.FixtureRequest, personal: Personal, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return its exports for ONNX Runtime."""
    pytest.importorskip("optimum.exporters.onnx", reason="the extra onnx is not installed")
    out = tmp_path_factory.mktemp("onnx") / "out"
    write_export(personal, out, form="onnx", precision=request.param)
    return out


def greedy(speaker: Speaker) -> str:
    return answer(speaker, ASKED, GREEDY).text


def last_logits(speaker: Speaker) -> np.ndarray[Any, Any]:
    speaker.model.reset()
    return speaker.model.feed(speaker.tokenizer.encode(ASKED).ids)


def test_the_folder_says_what_was_trained_on_torch(hf: Path, trained: Speaker) -> None:
    loaded = open_speaker(hf)
    np.testing.assert_allclose(last_logits(loaded), last_logits(trained), rtol=0, atol=1e-4)
    assert greedy(loaded) == greedy(trained)
    assert len(greedy(loaded)) > 10


def test_transformers_loads_it_and_says_the_same(
    hf: Path, personal: Personal, trained: Speaker, tmp_path: Path
) -> None:
    """Another program, which knows nothing of this project, loads the folder."""
    program = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, asked, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
ids = tokenizer(asked, return_tensors="pt")
logits = model(**ids).logits[0, -1]
said = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1]:]
print(json.dumps([logits.tolist(), tokenizer.decode(said, skip_special_tokens=True)]))
"""
    trust = "trust" if personal.adapter_size else "plain"
    done = subprocess.run(
        [sys.executable, "-c", program, str(hf), ASKED, trust],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    logits, said = json.loads(done.stdout)
    np.testing.assert_allclose(logits, last_logits(trained), rtol=0, atol=1e-4)
    assert said == greedy(trained)


def test_adapters_are_never_left_out_in_silence(hf: Path, personal: Personal) -> None:
    from transformers import AutoModelForCausalLM

    if not personal.adapter_size:
        assert not (hf / "modeling_pwff.py").exists()
        return
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=False)


def test_onnx_runtime_says_what_was_trained(onnx: Path, trained: Speaker) -> None:
    loaded = open_speaker(onnx, threads=1)
    assert loaded.model.name == "onnx"
    if json.loads((onnx / "export.json").read_text())["precision"] == "fp32":
        np.testing.assert_allclose(last_logits(loaded), last_logits(trained), rtol=0, atol=1e-4)
        assert greedy(loaded) == greedy(trained)
    else:
        found, expected = last_logits(loaded), last_logits(trained)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 0.2  # 49 products in eight bits at width 16, where a row has few entries


def test_optimum_loads_the_onnx_folder(onnx: Path, trained: Speaker) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optimum's own imports
        from optimum.onnxruntime import ORTModelForCausalLM

        loaded = ORTModelForCausalLM.from_pretrained(onnx)
    ids = torch.tensor([trained.tokenizer.encode(ASKED).ids])
    said = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    text = trained.tokenizer.decode(said[0, ids.shape[1] :].tolist())
    assert text == greedy(open_speaker(onnx, threads=1))


def test_the_report_tells_what_it_is_and_how_it_was_checked(
    hf: Path, onnx: Path, personal: Personal
) -> None:
    for folder, form in ((hf, "hf"), (onnx, "onnx")):
        report = json.loads((folder / "export.json").read_text())
        assert (report["format"], report["client"], report["round"]) == (form, CLIENT, 3)
        assert report["base"]["sha256"] == personal.identity.sha256
        assert report["modules"]["lora"] == 12
        assert report["modules"]["adapters"] == (36 if personal.adapter_size else 0)
        check = report["check"]
        assert check["tokens"] > 100
        if report["precision"] == "fp32":
            assert check["largest_difference"] < 1e-4 * max(1, check["largest_logit"])
            assert check["agreement"] > 0.99  # of equal logits two may change places
        else:
            assert 0.5 < check["agreement"] <= 1
        card = (folder / "README.md").read_text()
        for words in ("It is personal", "licence of the base", "### Instruction:", CLIENT):
            assert words in card


def test_an_export_that_computes_something_else_is_not_written(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "LORA_SCALE", 1.9)
    out = tmp_path / "exports" / "out"
    with pytest.raises(ExportFailedError, match="differ from the trained model's"):
        write_export(find_in_run(make_run(), CLIENT), out, form="hf", precision="fp32")
    assert not list(out.parent.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    out = tmp_path / "exports" / "out"
    with pytest.raises(InputError, match="No space left on device"):
        write_export(find_in_run(make_run(), CLIENT), out, form="hf", precision="fp32")
    assert not list(out.parent.iterdir())


def test_no_code_of_a_folder_is_run_by_talking_to_it(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_export(find_in_run(make_run(), CLIENT), out, form="hf", precision="fp32")
    (out / "modeling_pwff.py").write_text("raise SystemExit('it was run')")
    assert greedy(open_speaker(out))


def test_int8_is_refused_where_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'int8' with format 'hf'.*--format onnx"):
        check_wish("hf", "int8", tmp_path / "out", force=False)


@pytest.mark.parametrize(
    ("form", "module", "extra"),
    [
        ("hf", "peft", "edge"),
        ("onnx", "torch", "edge"),
        ("onnx", "onnxruntime", "onnx"),
        ("onnx", "optimum.exporters.onnx", "onnx"),
    ],
)
def test_a_missing_package_is_told_with_its_extra_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{module.partition('.')[0]}.*pwff\[{extra}\]"):
        check_wish(form, "fp32", tmp_path / "out", force=False)
