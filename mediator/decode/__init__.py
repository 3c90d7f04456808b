"""Registers, messages and page lists in words: what `mediator decode` shows.

`decode_registers`, `decode_message` and `decode_list` return plain data that JSON can carry: numbers of the ABI
are hexadecimal strings, counts are numbers. A word is a row `{"at", "name", "value", "words"}`, where `at` is
a register or an offset in bytes. `render` makes text of it. Nothing is refused for being unknown; bytes that
cannot be what they are said to be raise ValueError with one line.
"""

from mediator.decode._memory import decode_list, decode_message
from mediator.decode._registers import decode_registers
from mediator.decode._rows import Decoded
from mediator.decode._text import render

__all__ = ["Decoded", "decode_list", "decode_message", "decode_registers", "render"]
