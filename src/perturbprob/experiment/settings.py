"""Numbers that a user sets, refused at the border where they are of a wrong kind or out of range."""

from numbers import Integral, Real


def is_within(value: object, low: float, high: float) -> bool:
    """Say whether a value is a number between two others, neither of them included; True and False are none.

    >>> is_within(0.9, 0, 1), is_within("0.9", 0, 1), is_within(float("nan"), 0, 1)
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and low < float(value) < high


def check_range(low: float, high: float, **settings: float) -> None:
    """Refuse numbers that are not finite or outside [low, high]."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}; got {value!r}.")


def check_whole(least: int, **settings: int) -> None:
    """Refuse settings that are not whole numbers of at least the least."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")


def check_seed(seed: int) -> None:
    """Refuse a seed that random number generators do not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1; got {seed!r}.")
