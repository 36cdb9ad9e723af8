"""Alignment on one client: what trains, what travels, what it is held to, what is taken back."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES, Objective
from device_profiles.modules import BaseShape, first_lora_sites, lora_tensors
from device_profiles.reward_heads import TrunkShape
from edge_client.alignment import work as work_module
from edge_client.alignment.critic import Critic
from edge_client.data.prompts import Encoded, encode_example, prompt
from edge_client.inference.batched import generate
from edge_client.reward.head import Head, of_objective, scores
from edge_client.reward.judging import Judging, reward_layout
from edge_client.reward.reference import load_reference
from edge_client.stage_work import GlobalStates
from edge_client.state import ClientState, entering
from edge_client.trainer import evaluate
from messaging.codecs import decode_blob
from messaging.layout import Vector
from messaging.protocol import AlignmentSettings, Preference, Task
from tests.edge_client.conftest import (
    ADAPTER_SIZE,
    EXAMPLES,
    RANK,
    Academy,
    a_task,
    adapter_layout,
    own_data,
    random_tensors,
)

DATA = own_data(OBJECTIVES)
HEADS = reward_layout(OBJECTIVES, TrunkShape(base=BaseShape(layers=12, width=16, inner=64)))
NEW_TOKENS = 6


def align(round_: int = 2, settings: dict[str, Any] | None = None, **changes: Any) -> Task:
    """Return a task of alignment: a step of four responses of at most six tokens."""
    small = {"rollouts": 4, "max_new_tokens": NEW_TOKENS, "held_out_prompts": 3}
    fields = {"local_steps": 1, "batch_size": 2, "learning_rate": 0.003, "max_length": 128}
    how = AlignmentSettings(**{**small, **(settings or {})})
    return a_task(stage="alignment", round=round_, alignment=how, **{**fields, **changes})


def given(
    academy: Academy, shared: Vector | None = None, objectives: tuple[Objective, ...] = OBJECTIVES
) -> GlobalStates:
    """Return what comes with a task; by default alignment is at its beginning."""
    tuned = academy.adapters()
    return GlobalStates(
        shared=tuned if shared is None else shared,
        reward=academy.heads(*objectives),
        reference=tuned,
    )


@pytest.fixture
def tuned(academy: Academy) -> Academy:
    """Return the academy after a round of instruction tuning of its client."""
    academy.make().perform(a_task(), GlobalStates(shared=academy.adapters(1)))
    return academy


def updated(academy: Academy, blob: bytes | None) -> Vector:
    """Return what the aggregator reads of an update."""
    assert blob is not None
    return decode_blob(blob, adapter_layout(academy.model.base.identity))[1]


def assert_same(one: ClientState, other: ClientState) -> None:
    """Compare all but the round, bit by bit."""
    assert (one.stage, one.steps, one.numbers) == (other.stage, other.steps, other.numbers)
    assert (one.pending, other.pending) == (None, None)
    assert np.array_equal(np.asarray(one.residual), np.asarray(other.residual))
    for group in ("personal", "first_moments", "second_moments", "extra"):
        left, right = getattr(one, group), getattr(other, group)
        assert {n: t.tobytes() for n, t in left.items()} == {
            n: t.tobytes() for n, t in right.items()
        }


# -- what trains, and what travels -----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "dpo"])
def test_adapters_and_lora_learn_and_adapters_alone_travel(tuned: Academy, algorithm: Any) -> None:
    states = given(tuned, tuned.adapters(2))
    result = tuned.make().perform(align(2, {"algorithm": algorithm}), states)
    layout = adapter_layout(tuned.model.base.identity)
    update = updated(tuned, result.blob)
    on_model = tuned.model.take()
    adapters = layout.pack({n: t for n, t in on_model.items() if n in layout.names})
    assert states.shared is not None
    assert np.array_equal(update, adapters - states.shared)
    assert np.count_nonzero(update) > 0.9 * layout.size
    before, after = tuned.store().load(1), tuned.store().load(2)
    assert set(after.personal) == set(before.personal)
    assert len(after.personal) == 24
    assert all(np.array_equal(after.personal[n], on_model[n]) for n in after.personal)
    assert not any(np.array_equal(after.personal[n], before.personal[n]) for n in after.personal)
    assert after.stage == "alignment"
    assert set(after.first_moments) == set(on_model)
    assert result.examples == 4  # alignment weighs by examples, as stage 1 does


@pytest.mark.parametrize(("method", "count"), [("pfl", 36), ("vanilla-fl-own", 12)])
def test_where_lora_travels_as_well_the_client_keeps_critics_and_moments_alone(
    academy: Academy, method: str, count: int
) -> None:
    client = academy.make(method=method, lora_count=count)
    layout = client.setup.own_layout("alignment", count)
    tensors = random_tensors(academy.model.base.identity, seed=3)
    run = client.setup.layouts["alignment"]
    shared = 0.1 * run.pack({n: t for n, t in tensors.items() if n in run.names})
    states = dataclasses.replace(given(academy, shared), reference=shared)
    blob = client.perform(align(2), states).blob
    assert blob is not None
    update = decode_blob(blob, layout)[1]
    # 36 adapters of 2*16*4 + 16 + 4, and the device's modules of 2*(16 + 16)
    assert update.size == 36 * 148 + count * 64
    assert np.array_equal(update, academy.model.take_flat() - shared[: update.size])
    state, reference = academy.store().load(2), academy.store().reference()
    assert state.personal == {}
    assert len(state.extra) == 2 * 3 * 4
    assert reference is not None
    assert np.array_equal(reference, shared[: update.size])


def test_no_critic_no_lora_and_no_reference_is_in_an_update(tuned: Academy) -> None:
    client = tuned.make()
    client.perform(align(2), given(tuned))
    blob = client.perform(align(3), given(tuned, tuned.adapters(2))).blob
    assert blob is not None
    arrays = load(blob)
    assert {n: a.shape for n, a in arrays.items()} == {"packed": (5328,)}
    for word in (b"critic", b"lora", b"reward", b"stage-1"):
        assert word not in blob
    state, reference = tuned.store().load(3), tuned.store().reference()
    assert {n.split("/")[1] for n in state.extra} == set(OBJECTIVES)
    assert reference is not None
    private = [*state.extra.values(), *state.personal.values(), reference]
    assert len(private) == 2 * 3 * 4 + 24 + 1  # values and two moments of four tensors, two critics
    for tensor in private:
        if np.count_nonzero(tensor) > 1:
            assert tensor.tobytes() not in blob


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "dpo"])
def test_the_same_task_gives_the_same_bytes(tuned: Academy, algorithm: Any) -> None:
    task, client = align(3, {"algorithm": algorithm}), tuned.make()
    states = given(tuned, tuned.adapters(2))
    client.perform(align(2, {"algorithm": algorithm}), states)
    first = client.perform(task, states).blob
    assert first is not None
    assert client.perform(task, states).blob == first
    other = tuned.make("orin-02", lora_count=36)
    other.perform(align(2, {"algorithm": algorithm}, client="orin-02"), states)
    assert client.perform(task, states).blob == first
    client.perform(align(3, work="evaluate", outcome="aggregated"), states)
    assert client.perform(task, states).blob == first
    assert tuned.make().perform(task, states).blob == first  # started again
    anew = align(3, {"algorithm": algorithm}, seed=8)
    assert client.perform(anew, states).blob != first


def test_each_client_answers_prompts_of_its_own_drawing(academy: Academy) -> None:
    updates = [
        updated(academy, academy.make(c).perform(align(2, client=c), given(academy)).blob)
        for c in ("pi5-01", "pi5-02")
    ]
    assert not np.array_equal(*updates)


# -- critics ---------------------------------------------------------------------------------------


def test_critics_start_as_copies_of_the_reward_models_and_go_on_from_the_state(
    tuned: Academy, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    class Seen(Critic):
        def __init__(self, build: Any, tensors: Any, **more: Any) -> None:
            begun.append({"tensors": tensors, **more})
            super().__init__(build, tensors, **more)

    monkeypatch.setattr(work_module, "Critic", Seen)
    states = given(tuned)
    assert states.reward is not None
    heads = HEADS.unpack(states.reward)
    # a learning rate so small that no step stops for having gone too far
    tuned.make().perform(align(2, learning_rate=1e-6), states)
    kept = tuned.store().load(2)
    tuned.make().perform(align(3, learning_rate=1e-6), states)  # started again
    assert len(begun) == 4
    for name, first, second in zip(OBJECTIVES, begun[:2], begun[2:], strict=True):
        own = of_objective(heads, name)
        raw = scores(Head(own), tuned.judging.reference_features(heads, name))
        assert {n: t.tobytes() for n, t in first["tensors"].items()} == {
            n: t.tobytes() for n, t in own.items()
        }
        assert first["moments"].steps == 0
        for critic in (first, second):  # values on the scale of re-centred scores
            assert (critic["mean"], critic["deviation"]) == (raw.mean(), raw.std())
        prefix = f"critic/{name}/value/"
        learned = {n: t for n, t in kept.extra.items() if n.startswith(prefix)}
        assert {f"{prefix}{n}": t.tobytes() for n, t in second["tensors"].items()} == {
            n: t.tobytes() for n, t in learned.items()
        }
        moved = [n for n, t in own.items() if not np.array_equal(learned[f"{prefix}{n}"], t)]
        assert len(moved) == 4
        assert second["moments"].steps == kept.numbers[f"critic_steps_{name}"] == 16
        assert len(second["moments"].first) == len(second["moments"].second) == 4


@pytest.mark.parametrize("algorithm", ["rloo", "dpo"])
def test_without_critics_none_are_kept(tuned: Academy, algorithm: Any) -> None:
    tuned.make().perform(align(2, {"algorithm": algorithm}), given(tuned))
    assert tuned.store().load(2).extra == {}


# -- the reference ---------------------------------------------------------------------------------


def test_the_reference_is_the_policy_of_stage_1_and_stays_that(tuned: Academy) -> None:
    states = given(tuned)
    tuned.make().perform(align(1, work="evaluate"), states)
    stage_1 = tuned.store().load(1)
    lora = lora_tensors(first_lora_sites(tuned.shape.base, "qkv", 12), RANK)
    assert states.reference is not None
    wanted = np.concatenate([states.reference, *(stage_1.personal[t.name].ravel() for t in lora)])
    kept = tuned.store().reference()
    assert kept is not None
    assert np.array_equal(kept, wanted)
    moved = dataclasses.replace(states, shared=tuned.adapters(4), reference=tuned.adapters(5))
    for round_ in (2, 3):
        client = tuned.make()  # started again
        client.perform(align(round_), moved)
        client.perform(align(round_, work="evaluate"), moved)
    again = tuned.store().reference()
    assert again is not None
    assert np.array_equal(again, wanted)


def test_divergence_is_measured_from_the_reference(tuned: Academy) -> None:
    client = tuned.make()
    client.perform(align(2), given(tuned))
    # one step: what was drawn before it, by the policy of stage 1 itself
    assert tuned.store().load(2).numbers["kl"] == 0.0
    client.perform(align(3), given(tuned, tuned.adapters(2)))
    assert abs(tuned.store().load(3).numbers["kl"]) > 1e-3
    measured = client.perform(align(3, work="evaluate"), given(tuned)).responses
    assert measured is not None
    assert measured.kl == tuned.store().load(3).numbers["kl"]


def test_drift_shows_an_update_at_once_which_the_rollouts_before_it_cannot(tuned: Academy) -> None:
    client = tuned.make()
    before = client.perform(align(1, work="evaluate"), given(tuned)).responses
    assert before is not None
    assert before.drift == 0.0
    client.perform(align(2), given(tuned))
    after = client.perform(align(2, work="evaluate"), given(tuned)).responses
    assert after is not None
    assert after.kl == 0.0
    assert abs(after.drift) > 1e-3


def test_a_reference_that_is_gone_once_alignment_has_begun_is_told(tuned: Academy) -> None:
    client = tuned.make()
    client.perform(align(2), given(tuned))
    (tuned.folder / "pi5-01" / "stage-1.safetensors").unlink()
    for task in (align(3), align(2, work="evaluate")):
        with pytest.raises(InputError, match=r"policy of stage 1 of 'pi5-01' is gone from .*pi5-0"):
            client.perform(task, given(tuned))


def test_a_run_that_goes_back_to_stage_1_makes_a_reference_anew(tuned: Academy) -> None:
    client = tuned.make()
    client.perform(align(2), given(tuned))
    old = tuned.store().reference()
    client.perform(a_task(seed=8), GlobalStates(shared=tuned.adapters(1)))
    assert tuned.store().reference() is None
    client.perform(align(2), given(tuned))
    new = tuned.store().reference()
    assert old is not None
    assert new is not None
    assert not np.array_equal(old, new)


# -- coefficients and limits -----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
@pytest.mark.parametrize(("target", "factor"), [(6.0, 1 - 0.2 * 4 / 1000), (0.0, 1.0)])
def test_the_kl_coefficient_goes_on_over_rounds(
    tuned: Academy, algorithm: Any, target: float, factor: float
) -> None:
    # far below the target an error counts as 0.2, over 4 of 1000 responses
    how = {"algorithm": algorithm, "kl_target": target, "kl_coefficient": 0.3}
    for round_ in (2, 3):
        tuned.make().perform(align(round_, how), given(tuned))
    found = [tuned.store().load(r).numbers["kl_coefficient"] for r in (2, 3)]
    assert found == pytest.approx([0.3 * factor, 0.3 * factor**2], rel=1e-12)


def test_beyond_the_kl_limit_a_client_takes_no_further_step_of_the_round(tuned: Academy) -> None:
    apart = given(tuned, tuned.adapters(2))  # from the reference before the first step
    blobs = {}
    for steps, limit in ((1, 50.0), (3, 50.0), (3, 1e-3)):
        client = tuned.make()
        blob = client.perform(align(2, {"kl_limit": limit}, local_steps=steps), apart).blob
        blobs[steps, limit] = blob
    assert tuned.store().load(2).numbers["kl"] > 1e-3
    assert blobs[3, 1e-3] == blobs[1, 50.0]
    assert blobs[3, 50.0] != blobs[1, 50.0]


# -- preferences -----------------------------------------------------------------------------------


def test_preferences_make_other_updates_of_the_same_task(academy: Academy) -> None:
    updates = []
    for helpful in (1.0, 0.0, 0.5):
        preference = Preference(helpfulness=helpful, harmlessness=1 - helpful)
        client = academy.elsewhere(str(helpful)).make(preference=preference)
        updates.append(updated(academy, client.perform(align(2), given(academy)).blob))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(updates[one], updates[other])


def test_one_objective_alone_has_all_the_weight(academy: Academy) -> None:
    states = given(academy, objectives=("helpfulness",))
    blobs = set()
    for helpful in (1.0, 0.0):
        preference = Preference(helpfulness=helpful, harmlessness=1 - helpful)
        client = academy.elsewhere(str(helpful)).make(method="sfl", preference=preference)
        blobs.add(client.perform(align(2), states).blob)
        measured = client.perform(align(2, work="evaluate"), states).responses
        assert measured is not None
        assert set(measured.scores) == {"helpfulness"}
    (blob,) = blobs
    assert np.count_nonzero(updated(academy, blob))


# -- a round that is taken back --------------------------------------------------------------------


def test_restoring_puts_both_parts_back_as_they_were_before_the_round(tuned: Academy) -> None:
    states, client = given(tuned), tuned.make()
    client.perform(align(2, codec="int8"), states)
    before = client.perform(align(2, work="evaluate", outcome="aggregated"), states)
    on_model, kept = tuned.model.take_flat(), tuned.store().load(2)
    assert kept.residual is not None
    client.perform(align(3, codec="int8"), states)
    moved = given(tuned, tuned.adapters(2))
    client.perform(align(3, work="evaluate", outcome="aggregated"), moved)
    assert not np.array_equal(tuned.model.take_flat(), on_model)
    for _ in range(2):  # the same again, if it was not heard
        after = client.perform(align(3, work="restore"), states)
        assert np.array_equal(tuned.model.take_flat(), on_model)
        state = tuned.store().newest(before=4)
        assert state is not None
        assert_same(state, kept)
        assert after == before


def test_a_round_after_a_restored_one_goes_on_from_what_was_before(tuned: Academy) -> None:
    states, places = given(tuned), {}
    tuned.make().perform(align(2), states)
    for name in ("went without", "kept", "restored"):
        places[name] = tuned.elsewhere(name)
        shutil.copytree(tuned.folder / "pi5-01", places[name].folder / "pi5-01")
    for name in ("kept", "restored"):
        places[name].make().perform(align(3), states)
    places["restored"].make().perform(align(3, work="restore"), states)
    blobs = {name: place.make().perform(align(4), states).blob for name, place in places.items()}
    assert blobs["restored"] == blobs["went without"] != blobs["kept"]


def test_restoring_the_first_round_gives_what_alignment_began_with(tuned: Academy) -> None:
    states, client, stage_1 = given(tuned), tuned.make(), tuned.store().load(1)
    begun = client.perform(align(1, work="evaluate"), states)
    client.perform(align(2), states)
    assert client.perform(align(2, work="restore"), states) == begun
    assert begun.responses is not None
    assert begun.responses.kl is None
    state = tuned.store().newest(before=3)
    assert state is not None
    assert_same(entering(state, "alignment"), entering(stage_1, "alignment"))


# -- evaluation ------------------------------------------------------------------------------------


def test_scores_are_re_centred_ones_of_greedy_responses_to_held_out_prompts(tuned: Academy) -> None:
    states = given(tuned)
    assert states.reward is not None
    assert states.shared is not None
    result = tuned.make().perform(align(1, work="evaluate"), states)
    found = result.responses
    assert found is not None
    model, tokenizer = tuned.model, tuned.model.base.tokenizer
    model.activate(12)
    model.put(tuned.store().load(1).personal)
    model.put(adapter_layout(model.base.identity).unpack(states.shared))
    asked = [
        np.array(tokenizer(prompt(p.instruction)).input_ids) for p in DATA.held_out_prompts[:3]
    ]
    answers = [
        # one prompt at a time
        generate(model, [p], most_tokens=NEW_TOKENS, temperature=0, end_token=0, generator=None)[0]
        for p in asked
    ]
    closed = [
        Encoded(tokens=np.concatenate([p, a.tokens, [0]]), response_start=len(p))
        for p, a in zip(asked, answers, strict=True)
    ]
    reference = tuned.judging.trunk.response_features(
        [encode_example(e, tokenizer, 128) for e in load_reference().examples]
    )
    features = tuned.judging.trunk.response_features(closed)
    for name in OBJECTIVES:
        head = Head(of_objective(HEADS.unpack(states.reward), name))
        public = scores(head, reference)
        wanted = ((scores(head, features) - public.mean()) / public.std()).mean()
        # fp32 scores that are shifted and divided by a deviation of some hundredths
        assert found.scores[name] == pytest.approx(wanted, abs=1e-4)
    assert found.responses == 3
    assert found.tokens == pytest.approx(np.mean([len(a.tokens) for a in answers]))
    assert found.ended == pytest.approx(np.mean([a.ended for a in answers]))
    # and what stage 1 measured is measured again: does it forget?
    held_out = [encode_example(e, tokenizer, 128) for e in EXAMPLES[4:]]
    forgotten = evaluate(model, held_out)
    assert (result.eval_loss, result.eval_accuracy) == (forgotten.loss, forgotten.accuracy)


def test_evaluating_changes_nothing(tuned: Academy) -> None:
    client, states = tuned.make(), given(tuned)
    client.perform(align(2), states)
    folder = tuned.folder / "pi5-01"
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    on_model = tuned.model.take_flat()
    embedding = torch.clone(tuned.model.base.weights.positions)
    moved = given(tuned, adapter_layout(tuned.model.base.identity).pack(
        {n: t for n, t in tuned.model.take().items() if n.startswith("adapters.")}
    ))  # fmt: skip
    first = client.perform(align(2, work="evaluate"), moved)
    assert np.array_equal(tuned.model.take_flat(), on_model)
    assert client.perform(align(2, work="evaluate"), moved) == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    assert torch.equal(tuned.model.base.weights.positions, embedding)


# -- what goes through the model -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps", "rows"),
    [
        ({}, 2, 32),  # two steps of four responses, four times each
        ({"rollouts": 2}, 1, 8),  # of two responses there are only two minibatches
        ({"algorithm": "rloo", "rollouts": 8}, 1, 8),  # once each
        ({"algorithm": "dpo"}, 3, 12),  # three steps of two pairs
    ],
)
def test_what_is_trained_on_is_counted(
    tuned: Academy, settings: dict[str, Any], steps: int, rows: int
) -> None:
    # a learning rate so small that no step stops for having gone too far
    task = align(2, settings, local_steps=steps, learning_rate=1e-6)
    states, work = given(tuned), tuned.make()._works["alignment"]
    done = work.train(task, entering(tuned.store().load(1), "alignment"), states)
    assert done.rows == rows
    assert 20 * rows < done.tokens < 128 * rows
    if settings.get("algorithm") == "dpo":
        # of the eight pairs, the six that are trained on are read once
        assert done.read_tokens == pytest.approx(done.tokens, abs=1)
    else:  # each response four times forward
        epochs = 1 if settings.get("algorithm") == "rloo" else 4
        assert done.read_tokens == 4 * done.tokens / epochs


def test_reward_models_with_adapters_are_read_each_by_itself_and_paid_for(tuned: Academy) -> None:
    other = dataclasses.replace(
        tuned,
        judging=Judging(tuned.judging.base, adapter_size=ADAPTER_SIZE),
        reward_shares="adapters",
    )
    # adapters that change nothing: the same bits come of it, at one more pass of the trunk
    task = align(2, {"algorithm": "ppo"}, local_steps=1, learning_rate=1e-6)
    state = entering(tuned.store().load(1), "alignment")
    bare = tuned.make()._works["alignment"].train(task, state, given(tuned))
    both = other.make()._works["alignment"].train(task, state, given(other))
    assert both.tokens == bare.tokens
    assert 4 * both.read_tokens == 5 * bare.read_tokens
    assert bare.after is not None
    assert both.after is not None
    assert both.after.tobytes() == bare.after.tobytes()
    assert {n: t.tobytes() for n, t in both.state.extra.items()} == {
        n: t.tobytes() for n, t in bare.state.extra.items()
    }


def test_each_critic_reads_through_its_own_reward_models_adapters(tuned: Academy) -> None:
    other = dataclasses.replace(
        tuned,
        judging=Judging(tuned.judging.base, adapter_size=ADAPTER_SIZE),
        reward_shares="adapters",
    )
    states = given(other)
    assert states.reward is not None
    layout = other.setup().layouts["reward"]
    task = align(2, {"algorithm": "ppo"}, local_steps=1, learning_rate=1e-6)
    state = entering(tuned.store().load(1), "alignment")

    def critics(reward: Vector) -> dict[str, bytes]:
        moved = dataclasses.replace(states, reward=reward)
        done = other.make()._works["alignment"].train(task, state, moved)
        return {n: t.tobytes() for n, t in done.state.extra.items() if "/value/" in n}

    changed = {
        n: t + 0.3 if n.startswith("reward.helpfulness.trunk.") else t
        for n, t in layout.unpack(states.reward).items()
    }
    before, after = critics(states.reward), critics(layout.pack(changed))
    for name in before:
        assert (before[name] == after[name]) == name.startswith("critic/harmlessness/"), name


# -- what is not there -----------------------------------------------------------------------------


def test_without_reward_models_nothing_is_aligned(tuned: Academy) -> None:
    states = dataclasses.replace(given(tuned), reward=None)
    for task in (align(2), align(1, work="evaluate")):
        with pytest.raises(InputError, match="'pi5-01' is asked to align without reward models"):
            tuned.make().perform(task, states)


def test_a_client_whose_prompts_are_all_held_out_is_told_so(tuned: Academy) -> None:
    data = dataclasses.replace(DATA, prompts=[])
    with pytest.raises(InputError, match=r"'pi5-01' has no prompt to answer: .*give a file of pro"):
        tuned.make(data=data).perform(align(2), given(tuned))


def test_responses_that_leave_no_room_for_a_prompt_are_refused(tuned: Academy) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens = 40 leaves no room .*max_length = 40"):
        tuned.make().perform(align(2, {"max_new_tokens": 40}, max_length=40), given(tuned))
