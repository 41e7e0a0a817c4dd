"""The runtime type checker that jaxtyping's import hook puts around every function in the suite."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it
