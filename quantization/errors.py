"""What can go wrong when a base is looked up or loaded."""

from device_profiles.errors import InputError


class BaseModelError(InputError):
    """A base that is missing, damaged or no GPT-2."""


class HubUnavailableError(Exception):
    """A model hub was asked and did not answer."""

    exit_code = 1


class MissingExtraError(Exception):
    """A part of the project is used whose packages are not installed."""

    exit_code = 1
