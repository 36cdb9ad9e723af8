"""Whether a device fits the run that a manifest describes."""

from __future__ import annotations

from edge_client.local_client import Setup
from messaging import protocol
from messaging.protocol import Manifest


def why_not(manifest: Manifest, setup: Setup, binding: str) -> str | None:
    """Return why a device can take no part in a run, as a sentence with its remedy.

    Args:
        manifest: The run's.
        setup: What the device takes the run for.
        binding: Hash of the device's own base, tokenizer and placement.
    """
    if manifest.oldest > protocol.SCHEMA:
        return (
            f"the run's aggregator understands protocol {manifest.oldest} and newer, and this "
            f"device speaks {protocol.SCHEMA}; update pwff on this device"
        )
    if manifest.binding != binding:
        return (
            "the run is built on another base, tokenizer or LoRA placement than this device; "
            "give this device the run's model and placement"
        )
    if manifest.method != setup.method:
        return (
            f"the run's method is '{manifest.method}' and this device's is '{setup.method}'; "
            "give this device the run's"
        )
    if manifest.layout != setup.layouts_sha256:
        return (
            "the run shares other tensors than this device; compare the method's settings, the "
            "stages, reward_shares and reward_trunk"
        )
    return None
