"""One client's work: what goes into an update, what stays, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from device_profiles.channel import Link, upload_seconds
from device_profiles.errors import InputError
from device_profiles.methods import METHODS
from device_profiles.modules import initial_adapters, initial_lora, lora_sites
from device_profiles.pricing import CostBasis, cost_basis
from device_profiles.profile import find_profile
from device_profiles.seeds import stream
from edge_client.costs import stage_layout
from edge_client.data.own_data import OwnData
from edge_client.data.prompts import encode_example
from edge_client.local_client import LocalClient, Result
from edge_client.peft.tuned_model import TunedModel
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState, StateStore
from edge_client.trainer import evaluate
from edge_client.works import build_works
from messaging.chunks import wire_bytes
from messaging.codecs import CODECS, decode_blob
from messaging.errors import PrivateTensorError
from messaging.layout import Layout, Vector
from messaging.protocol import Codec, Outcome, PairFigures, Task
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import (
    ADAPTER_SIZE,
    EXAMPLES,
    RANK,
    a_device,
    a_setup,
    a_task,
    adapter_layout,
    modules,
    random_tensors,
)

SEED = 7
LINK = Link(snr_db=5.0, bandwidth_hz=1e6, transmit_watts=0.5)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Clients on one model that others, with up to 36 LoRA modules, use as well.

    Attributes:
        layout: Of a run that shares its adapters.
        start: The first global state.
        folder: Of the clients' folders, each named after its client.
    """

    model: TunedModel
    layout: Layout
    start: Vector
    folder: Path

    def make(
        self,
        client: str = "pi5-01",
        *,
        method: str = "pwff",
        priced: CostBasis | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        private: bool = False,
        **changes: Any,
    ) -> LocalClient:
        """Make a client; what is in its folder is its state."""
        setup = a_setup(self.shared(method), method=method, priced=priced)
        device = a_device(client, **changes)
        folder = self.folder / client
        data = OwnData(examples=EXAMPLES[:4], held_out=EXAMPLES[4:])
        return LocalClient(
            setup,
            build_works(setup, self.model, device, data, judging=None, folder=folder),
            base=self.model.base.identity,
            device=device,
            profile=find_profile("raspberry-pi-5-8gb"),
            link=LINK,
            folder=folder,
            clock=clock,
            private=private,
        )

    def shared(self, method: str) -> Layout:
        """Return what all devices of a run share under a method."""
        return stage_layout("instruction", METHODS[method], modules(self.model.base.identity))

    def store(self, client: str = "pi5-01") -> StateStore:
        """Return what a client keeps."""
        return StateStore(self.folder / client)

    def later(self, seed: int = 0) -> Vector:
        """Return a global state that others have moved."""
        moved = self.start + np.random.default_rng(seed).normal(0, 0.05, self.start.shape)
        return moved.astype(np.float32)

    def adapters(self) -> Vector:
        """Return the adapters that are on the model now."""
        names = self.layout.names
        return self.layout.pack({n: t for n, t in self.model.take().items() if n in names})

    def update(self, result: Result) -> Vector:
        """Return what the aggregator reads of a result."""
        return decode_blob(blob_of(result), self.layout)[1]


@pytest.fixture
def bench(tuned: Callable[..., TunedModel], identity: BaseIdentity, tmp_path: Path) -> Bench:
    """Return a model and an empty folder."""
    layout = adapter_layout(identity)
    start = layout.pack(initial_adapters(identity.shape, ADAPTER_SIZE, SEED))
    return Bench(model=tuned(36), layout=layout, start=start, folder=tmp_path)


def of(shared: Vector | None) -> GlobalStates:
    """Return what comes with a task of instruction tuning."""
    return GlobalStates(shared=shared)


def blob_of(result: Result) -> bytes:
    """Return a result's update."""
    assert result.blob is not None
    return result.blob


# -- what travels, and what stays ------------------------------------------------------------------


def test_an_update_is_exactly_after_minus_before(bench: Bench) -> None:
    before = bench.later()
    result = bench.make().perform(a_task(round=4), of(before), 0)
    header, update = decode_blob(blob_of(result), bench.layout)
    assert np.array_equal(update, bench.adapters() - before)
    assert np.count_nonzero(update) == bench.layout.size
    assert (header.run, header.round, header.sender, header.codec) == ("trial", 4, "pi5-01", "fp32")
    assert (header.examples, header.train_loss) == (4, result.train_loss)
    assert result.examples == 4


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_no_lora_tensor_is_in_an_update(bench: Bench, codec: Codec) -> None:
    client = bench.make()
    client.perform(a_task(codec=codec), of(bench.start), 0)  # B is zero before this, and no secret
    result = client.perform(a_task(codec=codec, round=2), of(bench.start), 0)
    blob = blob_of(result)
    arrays = load(blob)
    assert arrays["packed"].shape == (36 * (2 * 16 * ADAPTER_SIZE + 16 + ADAPTER_SIZE),)
    assert set(arrays) <= {"packed", "scales"}
    assert b"lora" not in blob
    personal = {n: t for n, t in bench.model.take().items() if n not in bench.layout.names}
    assert len(personal) == 24
    for tensor in personal.values():
        assert np.abs(tensor).min() > 0
        for kind in (np.float32, np.float16):
            assert tensor.astype(kind).tobytes() not in blob
    state = bench.store().load(2)
    assert set(state.personal) == set(personal)
    assert all(np.array_equal(state.personal[n], personal[n]) for n in personal)


def test_a_lora_tensor_cannot_be_packed_on_the_device(bench: Bench) -> None:
    with pytest.raises(PrivateTensorError, match=r"lora_A.* never leaves the device"):
        bench.layout.pack(bench.model.take())


def test_adapter_names_of_the_model_are_the_layouts(bench: Bench) -> None:
    # in their order, which is the order of packing
    assert [s.name for s in bench.layout.specs] == [
        n for n in bench.model.take() if n.startswith("adapters.")
    ]


def test_where_nothing_is_shared_there_is_no_update_and_adapters_are_personal(
    bench: Bench, identity: BaseIdentity
) -> None:
    client = bench.make(method="local-only", shared_parameters=0)
    result = client.perform(a_task(), of(None), 0)
    assert result.blob is None
    assert (result.costs.uplink_seconds, result.costs.uplink_joules) == (0.0, 0.0)
    assert result.costs.compute_seconds > 0
    after = bench.model.take()
    bench.model.put({n: np.ones_like(t) for n, t in after.items()})
    held_out = client.perform(a_task(work="evaluate"), of(None), 0)
    assert {n: t.tobytes() for n, t in bench.model.take().items()} == {
        n: t.tobytes() for n, t in after.items()
    }
    assert held_out.eval_loss is not None
    assert set(bench.store().load(1).personal) == set(after)
    begin = initial_adapters(identity.shape, ADAPTER_SIZE, SEED)
    assert not any(np.array_equal(after[n], begin[n]) for n in begin)


def test_a_client_without_lora_keeps_only_its_optimiser(bench: Bench) -> None:
    result = bench.make(lora_count=0).perform(a_task(), of(bench.start), 0)
    assert np.array_equal(bench.update(result), bench.adapters() - bench.start)
    state = bench.store().load(1)
    assert state.personal == {}
    assert set(state.first_moments) == bench.layout.names


# -- where LoRA travels as well --------------------------------------------------------------------


def lora_run(bench: Bench, method: str, seed: int = 0) -> tuple[Layout, Layout, Vector]:
    """Return what the run shares, what a device with 12 modules does, and a moved state."""
    layout = bench.shared(method)
    tensors = random_tensors(bench.model.base.identity, seed=seed)
    state = layout.pack({n: t for n, t in tensors.items() if n in layout.names})
    adapters = len([n for n in layout.names if n.startswith("adapters.")])
    return layout, Layout(layout.specs[: adapters + 24]), state


def on_the_model(bench: Bench, layout: Layout) -> Vector:
    """Return these tensors as they are on the model now."""
    return layout.pack({n: t for n, t in bench.model.take().items() if n in layout.names})


def test_where_lora_is_shared_an_update_holds_the_devices_own_modules_and_nothing_stays(
    bench: Bench,
) -> None:
    _, own, before = lora_run(bench, "vanilla-fl-own")
    result = bench.make(method="vanilla-fl-own").perform(a_task(), of(before), 0)
    header, update = decode_blob(blob_of(result), own)
    # 36 adapters of 2*16*4 + 16 + 4 and 12 modules of 2*(16 + 16)
    assert update.size == 36 * 148 + 12 * 64
    assert np.array_equal(update, on_the_model(bench, own) - before[: own.size])
    assert np.count_nonzero(update) == own.size
    assert header.layout == own.sha256
    state = bench.store().load(1)
    assert state.personal == {}
    assert set(state.first_moments) == own.names


def test_where_lora_alone_is_shared_it_is_all_that_travels(
    bench: Bench, tuned: Callable[..., TunedModel]
) -> None:
    alone = dataclasses.replace(bench, model=tuned(36, size=0))
    _, own, before = lora_run(alone, "fedlora-own")
    client = alone.make(method="fedlora-own", adapter_count=0)
    _, update = decode_blob(blob_of(client.perform(a_task(), of(before), 0)), own)
    assert update.size == 12 * 64
    assert np.array_equal(update, on_the_model(alone, own) - before[: own.size])
    assert {n.rsplit(".", 2)[1] for n in own.names} == {"lora_A", "lora_B"}


def test_shared_lora_is_replaced_by_the_global_one_and_not_kept(bench: Bench) -> None:
    _, own, before = lora_run(bench, "vanilla-fl-own")
    _, _, after = lora_run(bench, "vanilla-fl-own", seed=1)
    client = bench.make(method="vanilla-fl-own")
    client.perform(a_task(), of(before), 0)
    client.perform(a_task(work="evaluate", outcome="aggregated"), of(after), 0)
    assert on_the_model(bench, own).tobytes() == after[: own.size].tobytes()


def test_what_a_device_does_not_hold_of_the_global_state_changes_nothing(bench: Bench) -> None:
    _, own, before = lora_run(bench, "vanilla-fl-own")
    blob = blob_of(bench.make(method="vanilla-fl-own").perform(a_task(), of(before), 0))
    other = before.copy()
    other[own.size :] += 1
    assert blob_of(bench.make(method="vanilla-fl-own").perform(a_task(), of(other), 0)) == blob
    other[own.size - 1] += 1
    assert blob_of(bench.make(method="vanilla-fl-own").perform(a_task(), of(other), 0)) != blob


def test_a_residual_of_shared_lora_is_as_long_as_the_devices_own_update(bench: Bench) -> None:
    _, own, before = lora_run(bench, "vanilla-fl-own")
    client = bench.make(method="vanilla-fl-own")
    task = a_task(codec="int8")
    first = decode_blob(blob_of(client.perform(task, of(before), 0)), own)[1]
    left_out = on_the_model(bench, own) - before[: own.size] - first
    client.perform(a_task(work="evaluate", outcome="aggregated"), of(before), 0)
    residual = bench.store().load(1).residual
    assert residual is not None
    assert np.array_equal(residual, left_out)
    task = a_task(round=2, codec="int8")
    blob = blob_of(client.perform(task, of(before), 0))
    wanted = on_the_model(bench, own) - before[: own.size] + left_out
    assert np.array_equal(decode_blob(blob, own)[1], recoded(wanted, own, "int8"))
    assert blob_of(client.perform(task, of(before), 0)) == blob  # done again, the same bytes


@pytest.mark.parametrize("count", [11, 36])
def test_a_device_that_changed_its_count_of_shared_lora_is_told_so(
    bench: Bench, count: int
) -> None:
    """Its tensors all come from the global state; its optimiser's moments do not."""
    _, _, before = lora_run(bench, "vanilla-fl-own")
    bench.make(method="vanilla-fl-own").perform(a_task(), of(before), 0)
    changed = bench.make(method="vanilla-fl-own", lora_count=count)
    with pytest.raises(InputError, match=rf"'pi5-01' in .*pi5-01 is of other .* = {count} of rank"):
        changed.perform(a_task(round=2), of(before), 0)
    assert changed.perform(a_task(round=1), of(before), 0).blob is not None  # which begins anew


# -- rounds that are done again --------------------------------------------------------------------


def test_a_round_that_is_done_again_gives_the_same_bytes(bench: Bench) -> None:
    client, other = bench.make(), bench.make("orin-02", lora_count=36)
    second = bench.later()
    client.perform(a_task(codec="int8"), of(bench.start), 0)
    client.perform(a_task(work="evaluate", outcome="aggregated"), of(second), 0)
    task = a_task(round=2, codec="int8")
    blob = blob_of(client.perform(task, of(second), 0))
    assert blob_of(client.perform(task, of(second), 0)) == blob
    other.perform(a_task("orin-02"), of(bench.start), 0)
    assert blob_of(client.perform(task, of(second), 0)) == blob
    client.perform(a_task(work="evaluate", round=2, outcome="aggregated"), of(second), 0)
    assert blob_of(client.perform(task, of(second), 0)) == blob
    assert (
        blob_of(bench.make().perform(task, of(second), 0)) == blob
    )  # started again, from its folder


def test_each_client_has_batches_of_its_own(bench: Bench) -> None:
    updates = {
        client: bench.update(bench.make(client).perform(a_task(client), of(bench.start), 0))
        for client in ("pi5-01", "pi5-02")
    }
    assert not np.array_equal(updates["pi5-01"], updates["pi5-02"])


def test_training_goes_on_from_the_devices_own_state(bench: Bench) -> None:
    client = bench.make()
    losses = [
        client.perform(a_task(round=r, batch_size=4, local_steps=6), of(bench.start), 0).train_loss
        for r in (1, 2, 5)
    ]
    assert losses[0] is not None
    assert losses[2] is not None
    assert losses[2] < losses[0]  # the global state stayed: what was learned is personal
    store = bench.store()
    assert (store.rounds(), store.load(5).steps) == ([2, 5], 18)


# -- what lossy updates leave out ------------------------------------------------------------------


def recoded(vector: Vector, layout: Layout, codec: Codec) -> Vector:
    """Return what arrives of a vector."""
    row = CODECS[codec]
    return row.decode(row.encode(vector, layout), layout)


@pytest.mark.parametrize("told", ["by the evaluation", "by the next training"])
@pytest.mark.parametrize("codec", ["int8", "fp16"])
@pytest.mark.parametrize("outcome", ["aggregated", "late", "lost", "rejected"])
def test_what_an_update_left_out_is_sent_with_the_next_if_it_was_aggregated(
    bench: Bench, codec: Codec, outcome: Outcome, told: str
) -> None:
    client = bench.make()
    first = bench.update(client.perform(a_task(codec=codec), of(bench.start), 0))
    wanted = bench.adapters() - bench.start
    left_out = wanted - first
    assert np.count_nonzero(left_out)
    second = bench.later()
    task = a_task(round=2, codec=codec)
    if told == "by the evaluation":
        client.perform(a_task(work="evaluate", outcome=outcome), of(second), 0)
        client.perform(a_task(work="evaluate", outcome="none"), of(second), 0)  # known by now
    else:
        task = task.model_copy(update={"outcome": outcome})
    update = bench.update(client.perform(task, of(second), 0))
    wanted = bench.adapters() - second
    if outcome == "aggregated":
        wanted = wanted + left_out
    assert np.array_equal(update, recoded(wanted, bench.layout, codec))


def test_with_error_feedback_all_that_was_sent_is_all_that_was_learned(bench: Bench) -> None:
    client, store = bench.make(), bench.store()
    sent, learned = np.zeros(bench.layout.size), np.zeros(bench.layout.size)
    for round_ in (1, 2, 3):
        state = bench.later(round_)
        result = client.perform(a_task(round=round_, codec="int8"), of(state), 0)
        sent += bench.update(result)
        learned += bench.adapters().astype(np.float64) - state
        client.perform(a_task(work="evaluate", round=round_, outcome="aggregated"), of(state), 0)
    residual = store.load(3).residual
    assert residual is not None
    # fp32 sums of numbers below 1: off by some 2**-24 each
    np.testing.assert_allclose(sent + residual, learned, atol=5e-7)
    assert np.abs(residual).max() > 1e-5


def test_a_lossless_codec_sends_an_old_residual_once(bench: Bench) -> None:
    client = bench.make()
    client.perform(a_task(codec="int8"), of(bench.start), 0)
    for round_ in (2, 3):
        task = a_task(round=round_, outcome="aggregated")
        update = bench.update(client.perform(task, of(bench.start), 0))
        difference = bench.adapters() - bench.start
        assert np.array_equal(update, difference) == (round_ == 3)


def test_fp32_keeps_no_residual(bench: Bench) -> None:
    bench.make().perform(a_task(), of(bench.start), 0)
    state = bench.store().load(1)
    assert (state.residual, state.pending) == (None, None)


# -- evaluation ------------------------------------------------------------------------------------


def test_held_out_results_are_those_of_personal_modules_on_the_new_global_state(
    bench: Bench,
) -> None:
    client = bench.make()
    client.perform(a_task(), of(bench.start), 0)
    kept = (bench.folder / "pi5-01" / "state-000001.safetensors").read_bytes()
    bench.make("orin-02", lora_count=36).perform(a_task("orin-02"), of(bench.start), 0)
    new = bench.later()
    result = client.perform(a_task(work="evaluate", round=1, outcome="aggregated"), of(new), 0)
    bench.model.activate(12)
    bench.model.put(bench.store().load(1).personal)
    bench.model.put(bench.layout.unpack(new))
    held_out = [encode_example(e, bench.model.base.tokenizer, 96) for e in EXAMPLES[4:]]
    expected = evaluate(bench.model, held_out)
    assert (result.eval_loss, result.eval_accuracy) == (expected.loss, expected.accuracy)
    assert (result.examples, result.blob, result.train_loss) == (1, None, None)
    assert result.costs.compute_seconds == 0.0
    assert (bench.folder / "pi5-01" / "state-000001.safetensors").read_bytes() == kept


def test_before_the_first_round_a_client_measures_the_bare_base(bench: Bench) -> None:
    client = bench.make(lora_count=36)
    result = client.perform(a_task(work="evaluate", round=0), of(bench.start), 0)
    held_out = [encode_example(e, bench.model.base.tokenizer, 96) for e in EXAMPLES[4:]]
    bench.model.put({n: np.zeros_like(t) for n, t in bench.model.take().items()})
    bare = evaluate(bench.model, held_out)
    assert (result.eval_loss, result.eval_accuracy) == (bare.loss, bare.accuracy)
    assert bench.store().rounds() == []


def test_lora_begins_from_the_runs_seed_on_every_device(
    bench: Bench, identity: BaseIdentity
) -> None:
    for client in ("pi5-01", "pi5-02"):
        bench.make(client).perform(a_task(client, work="evaluate", round=0), of(bench.start), 0)
        expected = initial_lora(lora_sites(identity.shape, "qkv")[:12], RANK, SEED)
        on_it = bench.model.take()
        assert all(np.array_equal(on_it[n], t) for n, t in expected.items())


def test_an_example_is_never_longer_than_the_base_has_positions(bench: Bench) -> None:
    assert bench.make().perform(a_task(max_length=5000), of(bench.start), 0).blob is not None


# -- costs -----------------------------------------------------------------------------------------


def test_modelled_costs_follow_from_the_profile_and_the_link(
    bench: Bench, identity: BaseIdentity
) -> None:
    result = bench.make().perform(a_task(batch_size=4, local_steps=3), of(bench.start), 50_000)
    lengths = [len(encode_example(e, bench.model.base.tokenizer, 96).tokens) for e in EXAMPLES[:4]]
    tokens = sum(lengths)  # every batch holds all four examples
    # 4*N + 6*(A + L) + 12*layers*T*d a token: 36 adapters of 2*16*4 + 16 + 4 and 12 modules of
    # 2*(16 + 16), whatever the record says
    small = 36 * 148 + 12 * 64
    per_token = 4 * identity.parameters + 6 * small + 12 * 12 * (tokens // 4) * 16
    flops = 3 * tokens * per_token
    costs = result.costs
    assert costs.compute_seconds == pytest.approx(flops / 40e9, rel=1e-12)
    assert costs.compute_joules == pytest.approx(11.0 * flops / 40e9, rel=1e-12)
    bits = 8 * wire_bytes(len(blob_of(result)), 4096)
    airtime = upload_seconds(bits, LINK, stream(SEED, "channel", 1, "pi5-01"))
    assert (costs.uplink_bits, costs.uplink_seconds) == (bits, airtime)
    assert costs.uplink_joules == pytest.approx(0.5 * airtime, rel=1e-12)
    assert costs.download_bytes == 50_000
    # 1 MHz at 5 dB without fading: 2.057373 Mbit/s
    assert costs.downlink_seconds == pytest.approx(400_000 / 2.057373e6, rel=1e-6)


def test_costs_are_priced_at_another_shape_where_the_run_says_so(
    bench: Bench, identity: BaseIdentity
) -> None:
    priced = cost_basis("gpt2-small", identity.shape, 8)
    plain = bench.make().perform(a_task(), of(bench.start), 50_000)
    other = bench.make(priced=priced).perform(a_task(), of(bench.start), 50_000)
    assert blob_of(other) == blob_of(plain)  # what is learned and sent stays what it was
    # 36 adapters of 2*768*4 + 768 + 4 parameters instead of 2*16*4 + 16 + 4
    more = 32 * 36 * (6916 - 148)
    size = len(blob_of(plain))
    # and 64 bytes for each chunk more, of 4,032 bytes of payload
    chunks = -(-(size + more // 8) // 4032) - -(-size // 4032)
    assert other.costs.uplink_bits - plain.costs.uplink_bits == more + 8 * 64 * chunks
    assert other.costs.uplink_seconds > 30 * plain.costs.uplink_seconds
    assert other.costs.compute_seconds > 1000 * plain.costs.compute_seconds
    assert other.costs.downlink_seconds == pytest.approx(
        6916 / 148 * plain.costs.downlink_seconds, rel=1e-12
    )
    assert other.costs.download_bytes == plain.costs.download_bytes == 50_000


def test_measured_costs_are_the_clocks_at_the_profiles_power(bench: Bench) -> None:
    times = iter([100.0, 112.5])
    client = bench.make(costs="measured", clock=lambda: next(times))
    costs = client.perform(a_task(), of(bench.start), 0).costs
    assert (costs.compute_seconds, costs.compute_joules) == (12.5, 12.5 * 11.0)
    assert costs.uplink_seconds > 0


def test_each_round_and_each_client_has_a_channel_of_its_own(bench: Bench) -> None:
    times = {
        (client, round_): bench.make(client)
        .perform(a_task(client, round=round_), of(bench.start), 0)
        .costs.uplink_seconds
        for client in ("pi5-01", "pi5-02")
        for round_ in (1, 2)
    }
    assert len(set(times.values())) == 4


# -- a state that does not fit ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [11, 13, 36])
def test_a_device_that_changed_its_lora_count_is_told_so(bench: Bench, count: int) -> None:
    bench.make().perform(a_task(), of(bench.start), 0)
    changed = bench.make(lora_count=count)
    with pytest.raises(InputError, match=rf"'pi5-01' in .*pi5-01 is of other .* = {count} of rank"):
        changed.perform(a_task(round=2), of(bench.start), 0)
    assert (
        changed.perform(a_task(round=1), of(bench.start), 0).blob is not None
    )  # which begins anew


class Diverged:
    """Work whose held-out loss is beyond what a report holds."""

    def begin(self, _seed: int) -> ClientState:
        """Return nothing yet."""
        return ClientState(round=0, personal={})

    def evaluate(self, *_: object) -> Measured:
        """Measure reward models that others sent out of bounds."""
        figures = PairFigures(
            pairs=1, loss=1e7, accuracy=0.0, longer_wins=0.5, calibration_error=1.0
        )
        return Measured(examples=1, pairs={"helpfulness": figures})

    def train(self, *_: object) -> Trained:
        """Learn nothing."""
        return Trained(state=self.begin(0), after=None, loss=None, weight=1)


def test_figures_out_of_bounds_are_told_as_a_training_that_diverged(
    bench: Bench, identity: BaseIdentity
) -> None:
    client = LocalClient(
        a_setup(bench.layout),
        {"reward": Diverged()},
        base=identity,
        device=a_device("pi5-01"),
        profile=find_profile("raspberry-pi-5-8gb"),
        link=LINK,
        folder=bench.folder,
    )
    with pytest.raises(InputError, match=r"round 4 \(reward\) .*loss: .*; give the run a lower"):
        client.perform(a_task(work="evaluate", stage="reward", round=4))


def test_what_another_client_left_on_the_model_is_never_used(
    bench: Bench, identity: BaseIdentity
) -> None:
    first = blob_of(bench.make().perform(a_task(), of(bench.start), 0))
    bench.model.activate(36)
    bench.model.put(random_tensors(identity))
    assert blob_of(bench.make().perform(a_task(), of(bench.start), 0)) == first
    bench.model.activate(36)
    bench.model.put(random_tensors(identity))
    with pytest.raises(InputError, match="is of other LoRA modules"):
        bench.make().perform(a_task(), of(None), 0)  # adapters of nobody


# -- privacy ---------------------------------------------------------------------------------------


def a_private_task(work: str) -> Task:
    """Return a task of a private run."""
    return a_task(work=work, private=True)


def test_a_private_client_gives_its_update_and_nothing_else_of_its_data(bench: Bench) -> None:
    told = bench.make(private=True).perform(a_private_task("train"), of(bench.start))
    plain = bench.make("pi5-02").perform(a_task("pi5-02"), of(bench.start))
    header, update = decode_blob(blob_of(told), bench.layout)
    assert (header.examples, header.train_loss) == (1, None)
    assert (told.examples, told.train_loss) == (1, None)
    assert plain.train_loss is not None
    assert plain.examples == 4
    assert update.any()


def test_a_private_client_measures_itself_and_says_nothing_of_it(bench: Bench) -> None:
    told = bench.make(private=True).perform(a_private_task("evaluate"), of(bench.start))
    assert (told.examples, told.eval_loss, told.eval_accuracy, told.pairs) == (1, None, None, {})


def test_a_client_that_is_not_private_does_nothing_for_a_private_run(bench: Bench) -> None:
    with pytest.raises(InputError, match="set private = true"):
        bench.make().perform(a_private_task("train"), of(bench.start))
