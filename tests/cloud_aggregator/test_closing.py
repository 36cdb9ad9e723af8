"""What a person sees at the end of a run: every client before and after, a fall as a rise."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cloud_aggregator.closing import closing_lines, closing_table
from cloud_aggregator.records import (
    ClientBefore,
    ClientRound,
    DataRecord,
    GlobalRound,
    ModelRecord,
    Observed,
    RoundRecord,
    RunRecord,
    Summary,
)
from cloud_aggregator.summary import summarise
from messaging.protocol import Channel, DeviceRecord, PairFigures, Preference, Stage

LINK = Channel(
    snr_db=5.0, bandwidth_hz=1e6, transmit_watts=1.0, fading="none", coherence_seconds=0.01
)


def device(client: str) -> DeviceRecord:
    """Return a client that cares three times as much for helpfulness."""
    return DeviceRecord(
        id=client, profile="laptop-x86-cpu", lora_count=36, lora_rank=2, lora_rank_rule="given",
        adapter_count=6, adapter_size=4, placement="qkv", precision="fp32", threads=1,
        base_bytes=400, examples=87, held_out_examples=1, categories={}, trainable_parameters=100,
        shared_parameters=456, preference=Preference(helpfulness=0.75, harmlessness=0.25),
        channel=LINK, costs="modelled",
    )  # fmt: skip


def a_run(rounds: list[RoundRecord] | None = None, **changes: Any) -> RunRecord:
    """Return a run of these rounds with its summary."""
    stages: list[Stage] = list(dict.fromkeys(r.stage for r in rounds or [])) or ["instruction"]
    run = RunRecord(
        version="0",
        status="done",
        stop_reason="rounds",
        run="trial",
        seed=0,
        method="pwff",
        stages=stages,
        engine="local",
        workers=1,
        transport="mqtt",
        codec="fp32",
        model=ModelRecord(
            name="mini", parameters=3, layers=1, width=1, sha256="0", tokenizer_sha256="1"
        ),
        data=DataRecord(source="kit", examples=10),
        rounds=rounds or [],
        **changes,
    )
    run.summary = summarise(run) if rounds else run.summary
    return run


def a_round(stage: Stage, number: int, *clients: ClientRound, **changes: Any) -> RoundRecord:
    """Return a round in which all were taken."""
    return RoundRecord(
        stage=stage,
        round=number,
        accepted=[c.id for c in clients],
        virtual_seconds=1.0,
        clients=list(clients),
        global_=GlobalRound(),
        observed=Observed(),
        **changes,
    )


def tuned(client: str, accuracy: float, loss: float) -> ClientRound:
    """Return a client's part of a round of instruction tuning."""
    return ClientRound(
        id=client, status="aggregated", eval_accuracy=accuracy, eval_loss=loss,
        upload_bytes=1_150_000, uplink_seconds=5.45,
    )  # fmt: skip


def instruction_tuned() -> tuple[list[ClientBefore], list[RoundRecord]]:
    """Return what comes before the later stages."""
    before = [ClientBefore(id="laptop-04", eval_loss=5.0, eval_accuracy=0.15)]
    rounds = [
        a_round("instruction", n, tuned("laptop-04", accuracy, loss))
        for n, accuracy, loss in ((1, 0.16, 4.8), (2, 0.171, 4.673))
    ]
    return before, rounds


def staged(helpfulness: float = 2.0, longer: float = 0.6, **taken_back: Any) -> RunRecord:
    """Return a run of three stages; the weighted reward begins at 0.75 * 0.4 - 0.25 * 0.8."""
    before, rounds = instruction_tuned()
    before.append(
        ClientBefore(
            id="laptop-04", stage="alignment", eval_loss=4.673, eval_accuracy=0.171,
            reward_helpfulness=0.4, reward_harmlessness=-0.8,
        )
    )  # fmt: skip
    pairs = PairFigures(pairs=10, loss=0.4, accuracy=0.7, longer_wins=longer, calibration_error=0.1)
    learned = ClientRound(
        id="laptop-04", status="aggregated", pairs={"helpfulness": pairs}, reward_accuracy=0.7
    )
    aligned = ClientRound(
        id="laptop-04", status="aggregated", eval_accuracy=0.12, eval_loss=4.9, kl=1.5,
        reward_helpfulness=helpfulness, reward_harmlessness=0.0, response_tokens=30.0,
        responses_ended=1.0,
    )  # fmt: skip
    rounds += [a_round("reward", 3, learned), a_round("alignment", 4, aligned, **taken_back)]
    return a_run(rounds, before=before, clients=[device("laptop-04")])


def printed(run: RunRecord, width: int = 80) -> list[str]:
    """Return the lines of the closing table on a page of that width."""
    written = io.StringIO()
    Console(file=written, width=width).print(closing_table(run))
    return [line.rstrip() for line in written.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(("after", "word"), [(0.2, "rose"), (0.05, "fell"), (0.1, "stayed")])
def test_the_end_says_whether_accuracy_rose_or_fell(after: float, word: str) -> None:
    summary = Summary(eval_accuracy_before=0.1, eval_accuracy_after=after)
    lines = closing_lines(a_run(summary=summary))
    assert lines[0].startswith(f"Held-out accuracy {word} from 10.0 % to {100 * after:.1f} %")


def test_the_end_says_what_was_sent_or_that_nothing_was() -> None:
    figures = {"eval_accuracy_before": 0.1, "eval_accuracy_after": 0.1}
    assert "Nothing was uploaded." in closing_lines(a_run(summary=Summary(**figures)))
    summary = Summary(**figures, upload_bytes_total=2_000_000, mean_uplink_seconds=1.5)
    sent = closing_lines(a_run(summary=summary))
    assert any("2.0 MB" in line and "1.50 s" in line and "modelled" in line for line in sent)


def test_what_was_not_measured_is_said_to_be_so() -> None:
    assert closing_lines(a_run()) == ["Held-out accuracy was not measured.", "* modelled"]


def test_a_run_of_instruction_tuning_ends_as_the_readme_shows() -> None:
    before, rounds = instruction_tuned()
    run = a_run(rounds, before=before, clients=[device("laptop-04")])
    assert printed(run) == [
        "trial: done (rounds)",
        " client      LoRA   rows    accuracy, %       loss, nats     sent   uplink*",
        " ──────────────────────────────────────────────────────────────────────────",
        " laptop-04     36     87   15.0 -> 17.1   5.000 -> 4.673   2.3 MB    10.9 s",
    ]
    assert closing_lines(run) == [
        "Held-out accuracy rose from 15.0 % to 17.1 % (loss 5.000 to 4.673); it rose for 1 of 1 "
        "clients; the worst client has 17.1 %.",
        "2.3 MB of updates in 2 rounds; an upload takes 5.45 s and 0.00 J on average (modelled).",
        "* modelled",
    ]


def test_a_run_of_three_stages_ends_with_a_table_of_the_later_ones_in_80_columns() -> None:
    lines = printed(staged())
    assert lines[:4] == printed(a_run(instruction_tuned()[1], before=instruction_tuned()[0],
                                      clients=[device("laptop-04")]))  # fmt: skip
    assert lines[4:] == [
        " client      pairs, %   longer, %   weighted reward   KL, nats    accuracy, %",
        " ────────────────────────────────────────────────────────────────────────────",
        # 0.75 * 2
        " laptop-04       70.0        60.0    0.100 -> 1.500      1.500   17.1 -> 12.0",
    ]
    assert max(map(len, printed(staged(helpfulness=-2.0)))) <= 80


def test_the_end_says_what_reward_models_and_alignment_came_to() -> None:
    lines = closing_lines(staged())
    assert lines[0].startswith("Held-out accuracy rose from 15.0 % to 17.1 %")  # of stage 1
    assert lines[1:3] == [
        "The reward models are right in 70.0 % of held-out pairs, more than 'the longer one wins' "
        "(60.0 %).",
        "Weighted reward rose from 0.100 to 1.500 on average; it rose for 1 of 1 clients; KL from "
        "stage 1 1.500 nats; held-out accuracy 17.1 % to 12.0 %.",
    ]
    assert "in 4 rounds" in lines[3]


def test_a_fall_is_said_as_plainly_as_a_rise() -> None:
    lines = closing_lines(staged(helpfulness=-1.0, longer=0.8))
    assert "in 70.0 % of held-out pairs, less than 'the longer one wins' (80.0 %)" in lines[1]
    assert lines[2].startswith(
        "Weighted reward fell from 0.100 to -0.750 on average; it rose for 0 of 1 clients"
    )


def test_a_round_that_was_taken_back_is_said_with_its_reason_and_what_it_had() -> None:
    dropped = GlobalRound(
        weighted_reward=-1.5, reward_helpfulness=-1.0, reward_harmlessness=-3.0, kl=30.0
    )
    assert (
        "Round 4 was taken back: the policy went further from stage 1 than kl_limit allows (it "
        "had: weighted reward -1.500 (helpfulness -1.000, harmlessness -3.000), KL 30.000 nats)."
    ) in closing_lines(staged(taken_back="kl-limit", dropped=dropped))
