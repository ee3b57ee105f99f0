"""The one exception whose text is meant for a user, and the wrapper that prints it.

Not a hierarchy: a mistake that a user can mend raises `UserError` with one line that names the file, the key or row,
the value and the remedy. Everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake in what the user gave us; its text is one complete line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the valid name closest to `name`, else the list of valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"


def run_or_exit(main: Callable[[], None]) -> None:
    """Run `main`; a `UserError` becomes one line on standard error and exit code 2.

    What the terminal's encoding lacks is printed as its escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
