"""The one exception this package raises for input it cannot use."""

from __future__ import annotations


class EmbedLensError(ValueError):
    """One sentence that says what is wrong and what to do about it; the command line prints it without a traceback."""
