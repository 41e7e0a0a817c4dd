"""The one exception that stands for a mistake of the user's rather than of the code's."""


class UserError(ValueError):
    """A message in one line that names the value, the flag and the fix; the programs print it and exit non-zero."""
