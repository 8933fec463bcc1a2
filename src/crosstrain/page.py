"""A page in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

# The page may run only what is inside it and may fetch nothing, even if model text found a way to ask.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, body: str, *, styles: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """A whole page: `body`, which is HTML, with style sheets and scripts inside it."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{''.join(styles)}</style></head><body><main>{body}</main>"
        f"{''.join(scripts)}</body></html>\n"
    )


def part(package: str, name: str) -> str:
    """The text of a file that lies in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
