"""What reads bytes from the network holds on the fuzzers' corpus and on what is drawn around it.

``benchmarks/fuzz.py`` does the same for hours.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messaging.errors import ProtocolError

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks/fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # its dataclasses and annotations look themselves up
    spec.loader.exec_module(module)
    return module


fuzz = _load()
CASES = [(path.parent.name, path) for path in sorted(CORPUS.glob("*/*"))]


@pytest.mark.parametrize(
    ("target", "path"), CASES, ids=[f"{t}-{path.name[:8]}" for t, path in CASES]
)
def test_every_input_of_the_corpus_is_read_or_refused(target: str, path: Path) -> None:
    fuzz.run_one(target, path.read_bytes())


def test_the_corpus_holds_what_a_peer_says_to_every_target() -> None:
    for target, inputs in fuzz.seeds().items():
        kept = {path.read_bytes() for path in (CORPUS / target).iterdir()}
        assert kept >= set(inputs), f"{target}: python benchmarks/fuzz.py --write-corpus"


def test_what_the_right_peer_says_is_not_refused() -> None:
    # A target that refuses everything would hold on any input.
    seeds = fuzz.seeds()
    for target, count in (("envelope", 11), ("chunk", 1), ("mended_chunk", 1), ("blob", 4)):
        taken = 0
        for data in seeds[target]:
            try:
                fuzz.TARGETS[target](data)
            except ProtocolError:
                continue
            taken += 1
        assert taken == count, target


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_whatever_is_drawn_around_the_corpus_is_read_or_refused(target: str) -> None:
    known = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(data=fuzz.inputs(known))
    def holds(data: bytes) -> None:
        fuzz.run_one(target, data)

    holds()


@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_without_the_key_nothing_that_is_drawn_is_opened(data: bytes) -> None:
    cloud = fuzz._cloud_seal()
    with pytest.raises(ProtocolError):
        cloud.open(fuzz.CLIENT, b"S\1U" + data)
