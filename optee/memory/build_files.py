"""What an integrator has: the conf.mk of a build, a TA's user_ta_header_defines.h, a TA's ELF file."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final

from optee.memory.build import PAGE, Build, down, up
from optee.memory.profile import TaProfile

OPTIONS: Final = MappingProxyType(
    {
        "threads": "CFG_NUM_THREADS",
        "heap": "CFG_CORE_HEAP_SIZE",
        "nexus_heap": "CFG_CORE_NEX_HEAP_SIZE",
        "best_fit": "CFG_CORE_BGET_BESTFIT",
        "prealloc": "CFG_CORE_PREALLOC_EL0_TBLS",
        "table_entries": "CFG_PGT_CACHE_ENTRIES",
        "lpae": "CFG_WITH_LPAE",
        "virtualization": "CFG_NS_VIRTUALIZATION",
        "guest_count": "CFG_VIRT_GUEST_COUNT",
        "secure_ram": "CFG_TZDRAM_SIZE",
        "tee_ram": "CFG_TEE_RAM_VA_SIZE",
        "cores": "CFG_TEE_CORE_NB_CORE",
        "bignum_bits": "CFG_CORE_BIGNUM_MAX_BITS",
        "dynamic_shm": "CFG_CORE_DYN_SHM",
        "dynamic_config": "CFG_DYN_CONFIG",
    }
)
"""Name in OP-TEE's build of each field of `Build`."""
BOUNDS: Final = MappingProxyType(
    {
        "threads": (1, 1024),
        "heap": (4096, 1 << 30),
        "nexus_heap": (1024, 1 << 30),
        "table_entries": (1, 1 << 20),
        "guest_count": (1, 65535),
        "secure_ram": (1 << 20, 1 << 40),
        "tee_ram": (1 << 19, 1 << 30),
        "cores": (1, 1024),
        "bignum_bits": (512, 16384),
    }
)
"""Smallest and largest value of each number that makes sense."""
_FLAGS: Final = frozenset(item.name for item in fields(Build) if item.name not in BOUNDS)
_OLD_NAMES: Final = {"CFG_VIRTUALIZATION": "virtualization"}
_FIELDS: Final = {option: name for name, option in OPTIONS.items()} | _OLD_NAMES
_ASSIGNMENT: Final = re.compile(r"(?:export\s+|override\s+)*(CFG_\w+)\s*[:?]?=\s*(.*)\Z")
_MAKE: Final = re.compile(
    r"(\$[({]|[-s]?include\b|ifn?(eq|def)\b|else\b|endif\b|endef\b|(un)?export\b|override\b|.*[=:])"
)
"""How a line of a makefile begins that is no comment; of these only assignments of CFG_ options are read."""
_DEFINE: Final = re.compile(r"#\s*define\s+(\w+)(?!\()\s+(.+)\Z")
_TA_FLAG_SINGLE_INSTANCE: Final = 1 << 2


class FileError(ValueError):
    """A file is not what it should be; says where."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a conf.mk says: values of `Build`, and the line that each stands in."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def onto(self, build: Build) -> Build:
        """Replace what the file says."""
        return replace(build, **self.values)


def read_conf(text: str, name: str) -> Configuration:
    """Read the CFG_* lines of a build's conf.mk. Raises FileError."""
    found = Configuration()
    any_option = continued = False
    for number, line in enumerate(text.splitlines(), 1):
        plain = line.partition("#")[0].strip()
        match = _ASSIGNMENT.match(plain)
        skipped, continued = continued or line.startswith("\t"), plain.endswith("\\")
        if match is None:
            if plain and not skipped and not _MAKE.match(plain):
                column = len(line) - len(line.lstrip()) + 1
                raise FileError(f"{name}:{number}:{column}: {plain!r:.60} is no line of a makefile")
            continue
        any_option = True
        option, value = match.group(1), match.group(2).strip()
        if option == "CFG_ARM64_core" and value == "y":
            found.values["lpae"] = True
            found.lines.setdefault("lpae", number)
        known = _FIELDS.get(option)
        if known is None or not value:
            continue
        try:
            found.values[known] = option_value(known, value)
        except ValueError as error:
            raise FileError(f"{name}:{number}: {option}: {error}") from None
        found.lines[known] = number
    if not any_option:
        raise FileError(f"{name}: no line of it sets a CFG_ option")
    return found


def option_value(name: str, text: str) -> int | bool:
    """The value of a field of `Build` as OP-TEE's build writes it. Raises ValueError."""
    if name in _FLAGS:
        if text not in ("y", "n"):
            raise ValueError(f"{text!r} is neither y nor n")
        return text == "y"
    value = evaluate(text)
    low, high = BOUNDS[name]
    if not low <= value <= high:
        raise ValueError(f"{value} is not from {low} to {high}")
    return value


def evaluate(text: str) -> int:
    """A number as in C: decimal or 0x, sums, products and shifts of them. Raises ValueError."""
    plain = re.sub(r"\b(0[xX][0-9a-fA-F]+|[0-9]+)[uUlL]+\b", r"\1", text)
    if len(plain) > 200:
        raise ValueError("too long for a number")
    try:
        return _number(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ValueError(f"{text!r} is no number") from None


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left), _number(node.right)
        if max(abs(left), abs(right)) < 1 << 48:
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.LShift) and 0 <= right < 48:
                return left << right
            if isinstance(node.op, ast.BitOr):
                return left | right
    raise ValueError


def read_ta_header(text: str, name: str) -> TaProfile:
    """TA_STACK_SIZE, TA_DATA_SIZE and TA_FLAGS of a user_ta_header_defines.h. Raises FileError."""
    values: dict[str, tuple[int, str]] = {}
    joined = re.sub(r"\\\n", " ", text)
    for number, line in enumerate(joined.splitlines(), 1):
        match = _DEFINE.match(re.sub(r"/\*.*?\*/|//.*", " ", line).strip())
        if match is not None:
            values[match.group(1)] = number, match.group(2).strip()

    def value(key: str) -> int:
        if key not in values:
            raise FileError(f"{name}: does not define {key}")
        number, expression = values[key]
        try:
            size = evaluate(expression)
        except ValueError as error:
            raise FileError(f"{name}:{number}: {key}: {error}") from None
        if not 0 < size <= 1 << 32:
            raise FileError(f"{name}:{number}: {key}: {size} is no size of a TA")
        return size

    flags = values.get("TA_FLAGS", (0, ""))[1]
    single = "TA_FLAG_SINGLE_INSTANCE" in flags
    return TaProfile(name, stack=value("TA_STACK_SIZE"), heap=value("TA_DATA_SIZE"), single_instance=single)


_ELF: Final = struct.Struct("<4sBB10xHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_PT_LOAD: Final = 1
_WRITABLE: Final = 2
_TA_HEAD: Final = struct.Struct("<16sIIQ")
"""struct ta_head: UUID, bytes of stack, flags, entry."""


def read_ta_elf(data: bytes, name: str) -> TaProfile:
    """Segments of a TA's ELF file (64 bit), and stack and flags of its section .ta_head. Raises FileError.

    Of a writable segment all is counted as heap, which is part of it (.bss).
    """
    try:
        magic, bits, order, _, _, _, _, program_at, section_at, _, _, program_size, programs, size, count, names = (
            _ELF.unpack_from(data)
        )
        if magic != b"\x7fELF":
            raise FileError(f"{name}: not an ELF file")
        if (bits, order) != (2, 1) or program_size != _PROGRAM.size or size not in (0, _SECTION.size):
            raise FileError(f"{name}: not an ELF file of 64 bit, little endian")
        loaded = [
            (flags, address, memory)
            for kind, flags, _, address, _, _, memory, _ in _table(_PROGRAM, data, program_at, programs)
            if kind == _PT_LOAD
        ]
        head = _ta_head(data, list(_table(_SECTION, data, section_at, count)), names)
    except struct.error:
        raise FileError(f"{name}: an ELF file that ends too soon") from None
    if not loaded or head is None:
        raise FileError(f"{name}: an ELF file, but no TA: it has no section .ta_head")
    sizes = [(flags, up(address + memory) - down(address)) for flags, address, memory in loaded]
    data_size = sum(size for flags, size in sizes if flags & _WRITABLE)
    code = sum(size for flags, size in sizes if not flags & _WRITABLE)
    _, stack, flags, _ = head
    heap = max(data_size - 2 * PAGE, 0)
    single = bool(flags & _TA_FLAG_SINGLE_INSTANCE)
    return TaProfile(name, code=code, stack=stack, heap=heap, single_instance=single)


def _table(layout: struct.Struct, data: bytes, at: int, count: int) -> Iterator[tuple[Any, ...]]:
    for index in range(count):
        yield layout.unpack_from(data, at + index * layout.size)


def _ta_head(data: bytes, sections: list[tuple[Any, ...]], names: int) -> tuple[Any, ...] | None:
    if names >= len(sections):
        return None
    base = sections[names][4]
    for section in sections:
        start = base + section[0]
        if data[start : data.find(b"\0", start)] == b".ta_head":
            return _TA_HEAD.unpack_from(data, section[4])
    return None
