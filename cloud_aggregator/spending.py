"""What a run has spent of its clients' privacy, kept in its record round by round."""

from __future__ import annotations

from cloud_aggregator.privacy import privacy_record
from cloud_aggregator.records import RunRecord
from cloud_aggregator.settings import RunSettings
from device_profiles.errors import InputError


def account(record: RunRecord, settings: RunSettings) -> None:
    """Say in the record what its rounds so far have spent; nothing where the run is not private.

    Raises:
        InputError: If its earlier rounds were made under other settings of privacy.
    """
    privacy, earlier = settings.counting.privacy, record.privacy
    if privacy is not None:
        record.privacy = privacy_record(
            privacy,
            len(record.rounds),
            repeatable_noise=settings.virtual_time,
            earlier=earlier,
        )
    elif earlier is not None and earlier.rounds:
        raise InputError(
            f"the run's {earlier.rounds} rounds were made with [privacy], and it is asked to go on "
            "without; give the section as it was, or start a new run"
        )
