"""Bad input, told in one sentence that names field, value, bound and remedy."""


class InputError(ValueError):
    """Something that a person wrote and must correct; the command exits with 2."""

    exit_code = 2
