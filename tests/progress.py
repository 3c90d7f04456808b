"""What `mediator serve` says on standard error, without what depends on how fast the machine is."""

import re


def without_progress(text: str) -> str:
    """The text without the plain lines that come every ten seconds."""
    return re.sub(r"^\d+ s: .*\n", "", text, flags=re.MULTILINE)
