"""Which backend holds a precision here: what runs is taken, what does not is named."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from quantization import precision, trial
from quantization.backends.dense import Fp32Matrix, hold_fp32
from quantization.matrix import FrozenMatrix
from quantization.precision import available, choose
from quantization.trial import fault_elsewhere, fault_of

ALWAYS = ["fp32", "bf16", "int8", "nf4"]


@pytest.fixture
def nothing_tried() -> Iterator[None]:
    """Forget what was tried, before and after."""
    precision._fault.cache_clear()
    yield
    precision._fault.cache_clear()


@pytest.fixture
def bitsandbytes_faulty(monkeypatch: pytest.MonkeyPatch, nothing_tried: None) -> None:  # noqa: ARG001
    """Have bitsandbytes installed, and its kernels end the process."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    fault = "its process ended (exit code 1)"
    monkeypatch.setattr(precision, "fault_elsewhere", lambda *_: fault)


# -- choosing --------------------------------------------------------------------------------------


def test_every_precision_of_the_command_line_runs_on_any_cpu() -> None:
    found = available("cpu")
    assert list(found) == [*ALWAYS[:3], "int8-dynamic", "nf4"]
    assert all(found[name].backend is not None for name in ALWAYS)
    assert [choose(name).name for name in ALWAYS] == [found[name].backend for name in ALWAYS]


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_bitsandbytes_is_taken_where_a_process_that_runs_its_kernels_says_they_work() -> None:
    assert fault_elsewhere("nf4", "bitsandbytes", "cpu") == ""
    assert available("cpu")["nf4"].backend == choose("nf4").name == "bitsandbytes"


@pytest.mark.usefixtures("bitsandbytes_faulty")
def test_a_backend_that_fails_gives_way_to_the_next() -> None:
    assert choose("nf4").name == "torch"
    found = available()["nf4"]
    assert found.backend == "torch"
    assert found.words == "bitsandbytes: its process ended (exit code 1)"


@pytest.mark.usefixtures("bitsandbytes_faulty")
def test_a_backend_asked_for_by_name_does_not_give_way() -> None:
    words = (
        r"precision 'nf4' does not run on 'cpu' here \(bitsandbytes: its process ended \(exit code "
        r"1\)\); what does: fp32 \(torch\), bf16 \(torch\), int8 \(torch\), .*nf4 \(torch\)$"
    )
    with pytest.raises(InputError, match=words):
        choose("nf4", "cpu", "bitsandbytes")


@pytest.mark.usefixtures("nothing_tried")
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose("nf4").name == "torch"
    words = r"bitsandbytes is not installed \(pip install 'pwff\[quantized\]'\)"
    with pytest.raises(InputError, match=words):
        choose("nf4", "cpu", "bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes_faulty")
def test_dynamic_int8_is_refused_where_the_processor_has_no_kernel_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(InputError, match=r"slow on this processor \(AVX2, not AVX512\)"):
        choose("int8-dynamic")
    assert choose("int8").name == "torch"


@pytest.mark.usefixtures("nothing_tried")
def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(found.backend is None for found in available("cuda").values())
    with pytest.raises(InputError, match=r"torch sees no GPU.*nor does any other: take cpu"):
        choose("int8", "cuda:0")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("int4",), "unknown precision 'int4'; choose one of fp32, bf16, int8, int8-dynamic, nf4"),
        (("int8", "mps"), "unknown device 'mps'; choose one of cpu, cuda"),
        (("int8", "cuda:x"), "unknown device 'cuda:x'"),
        (
            ("nf4", "cpu", "quanto"),
            "unknown backend 'quanto' of precision 'nf4'; choose one of bits",
        ),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(asked: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        choose(*asked)


def test_an_unknown_device_is_refused_before_anything_is_tried() -> None:
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        available("tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_every_precision_of_the_command_line_runs_on_a_gpu() -> None:
    found = available("cuda")
    assert all(found[name].backend is not None for name in ALWAYS)


# -- trying ----------------------------------------------------------------------------------------


class Wrong(Fp32Matrix):
    """A matrix that does one thing wrong."""

    def __init__(self, weight: Tensor, what: str) -> None:
        super().__init__(weight)
        self._what = what

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product, unless that is what is wrong."""
        if self._what == "product":
            return super().times(x, bias).mul_(1.01)
        if self._what == "bias":
            return super().times(x)
        if self._what == "one row":  # a kernel for one row, as in generation
            return super().times(x, bias) * (1.0 if len(x) > 1 else 0.9)
        if self._what == "overflow":  # 16 bits where pairs of products are summed
            return super().times(x, bias).clamp_(-60.0, 60.0)
        return super().times(x, bias)

    def times_transposed(self, g: Tensor) -> Tensor:
        """Return the gradient, unless that is what is wrong."""
        gradient = super().times_transposed(g)
        return gradient * float("nan") if self._what == "gradient" else gradient

    def rows(self, index: Tensor) -> Tensor:
        """Return rows, unless that is what is wrong."""
        return super().rows(index.flip(0) if self._what == "row" else index)

    def dense(self) -> Tensor:
        """Return the weight, unless that is what is wrong."""
        return super().dense() * (1.01 if self._what == "weight" else 1.0)


def fault(hold: Callable[[Tensor, str], FrozenMatrix]) -> str:
    """Try on the CPU, within a thousandth."""
    return fault_of(hold, "cpu", weight_error=1e-3, product_error=1e-3)


def test_what_works_has_no_fault() -> None:
    assert fault(hold_fp32) == ""
    assert fault(lambda weight, _: Wrong(weight, "nothing")) == ""


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("weight", "a weight"),
        ("row", "a row"),
        ("product", "a product"),
        ("bias", "a product"),
        ("one row", "a product"),
        ("overflow", "a product"),
        ("gradient", "a gradient nan"),
    ],
)
def test_wrong_numbers_are_found_and_named(what: str, named: str) -> None:
    words = fault(lambda weight, _: Wrong(weight, what))
    assert words.startswith(f"wrong numbers: relative error of {named}")
    assert words.endswith(", at most 0.001") or what == "row"


def test_what_a_kernel_raises_is_its_fault() -> None:
    def hold(*_: object) -> FrozenMatrix:
        raise RuntimeError("no kernel image is available\nCUDA kernel errors might be")

    assert fault(hold) == "RuntimeError: no kernel image is available"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -ILL $$", "its process ended (signal SIGILL)"),
        ("echo 'no kernel image'; exit 1", "its process ended (exit code 1)"),
        ("exit 0", "its process ended (exit code 0)"),
    ],
)
def test_a_kernel_that_ends_its_process_is_a_fault(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert fault_elsewhere("nf4", "bitsandbytes", "cpu") == words


def test_a_kernel_that_does_not_come_back_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_WAIT_SECONDS", 1e-3)  # no interpreter starts that fast
    assert fault_elsewhere("nf4", "torch", "cpu") == "no answer within 0.001 s"


def test_a_trial_elsewhere_is_the_trial_here() -> None:
    assert fault_elsewhere("nf4", "torch", "cpu") == ""
