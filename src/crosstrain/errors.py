"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was got, what is allowed, where, and the fix.

    The command line prints it as one line and exits with code 2.
    """


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters but line ends and tabs, and those that turn text around, as escapes.

    >>> print(visible("a" + chr(27) + "[31mb"))
    a\\x1b[31mb
    """
    harmless = (c if c in "\n\t" or not (unicodedata.category(c) == "Cc" or c in _TURNS) else _escaped(c) for c in text)
    return "".join(harmless)


_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


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
