"""The one exception for mistakes a user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was got, what is allowed, where, and the fix.

    The command line prints it as one line and exits with code 2.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint that names the allowed value nearest to `name`, or all of them when none is near.

    >>> nearest("learing_rate", ["learning_rate", "seed"])
    "did you mean 'learning_rate'?"
    >>> nearest("zzz", ["b", "a"])
    'allowed: a, b'
    """
    options = sorted(allowed)
    close = get_close_matches(name, options, n=1)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(options)}"
