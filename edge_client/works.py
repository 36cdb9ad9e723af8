"""A client's work in each stage of its run, put together from its data and what it shares."""

from __future__ import annotations

from pathlib import Path

from device_profiles.methods import find_method
from device_profiles.reward_heads import TrunkShape
from edge_client.alignment.work import AlignmentData, AlignmentWork
from edge_client.data.own_data import OwnData
from edge_client.instruction_work import InstructionWork
from edge_client.local_client import Setup
from edge_client.peft.build import Tunable
from edge_client.policy import Policy
from edge_client.progress import Progress
from edge_client.reward.encoder import Encoder
from edge_client.reward.judging import Judging
from edge_client.reward.work import RewardWork
from edge_client.stage_work import StageWork
from edge_client.state import StateStore
from messaging.protocol import DeviceRecord, Stage
from quantization.encoder_identity import EncoderIdentity
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity


def load_judging(
    identity: BaseIdentity,
    precision: str,
    *bases: FrozenBase,
    shape: TrunkShape | None = None,
    kept: Path | None = None,
    encoder: EncoderIdentity | None = None,
) -> Judging:
    """Return the trunk that reward models read, with the reference set that they are scaled by.

    Args:
        identity: Of the base.
        precision: Of the trunk.
        bases: Those in memory already: of the same precision, no second one is loaded.
        shape: What of the trunk is each reward model's own; by default nothing.
        kept: Folder of features that a process after this one need not read again.
        encoder: That is the trunk instead; what is no response is read by the base then.

    Raises:
        BaseModelError: If the encoder is none, or damaged.
    """
    there = (base for base in bases if base.precision == precision)
    base = next(there, None) or load_frozen(identity, precision)
    read = None if encoder is None else Encoder(str(encoder.folder), encoder.sha256)
    size, whole = (0, False) if shape is None else (shape.adapter_size, shape.whole)
    return Judging(base, adapter_size=size, whole=whole, kept=kept, encoder=read)


def build_works(
    setup: Setup,
    model: Tunable,
    device: DeviceRecord,
    data: OwnData,
    *,
    judging: Judging | None,
    folder: Path,
    progress: Progress | None = None,
) -> dict[Stage, StageWork]:
    """Return what a client does in each stage of a run.

    Args:
        setup: Of the run; its layouts say which stages there are.
        model: Lent to the client.
        device: What it is.
        data: What it holds.
        judging: Where the run has reward models.
        folder: Where its state is kept.
        progress: Where it is written down how far a training is; none begins it anew.
    """
    stages = list(setup.layouts)
    policy_layout = setup.layouts["instruction" if "instruction" in stages else stages[-1]]
    policy = Policy(model, device, policy_layout, folder)
    instructions = InstructionWork(
        policy,
        train_examples=data.examples,
        held_out=data.held_out,
        others=data.others,
        lora_rank=setup.lora_rank,
        adapter_size=setup.adapter_size,
        progress=progress,
    )
    works: dict[Stage, StageWork] = {}
    objectives = find_method(setup.method).objectives
    for stage in stages:
        if stage == "instruction":
            works[stage] = instructions
        elif judging is not None and stage == "reward":
            works[stage] = RewardWork(
                judging,
                objectives=objectives,
                layout=setup.layouts[stage],
                device=device,
                pairs=data.pairs,
                held_out=data.held_out_pairs,
                begin=instructions.begin,
                interruption=None if progress is None else progress.interruption,
            )
        elif judging is not None:
            works[stage] = AlignmentWork(
                policy,
                instructions,
                judging,
                objectives=objectives,
                preference=device.preference,
                data=AlignmentData(
                    prompts=data.prompts,
                    held_out_prompts=data.held_out_prompts,
                    pairs=data.pairs,
                ),
                store=StateStore(folder),
                interruption=None if progress is None else progress.interruption,
            )
    return works
