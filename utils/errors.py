"""Exceptions that stand for what the user can mend rather than for a fault of the code's."""


class UserError(ValueError):
    """A message in one line that names the value, the flag and the fix; the programs print it and exit non-zero."""


class AbsentVAEError(UserError):
    """A VAE that is neither here nor to be fetched."""


class DataError(UserError):
    """Data that could be read when the program started cannot be any more."""
