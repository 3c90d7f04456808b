"""conf.mk, header files and ELF files of users, good and bad."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optee.memory.build import Build
from optee.memory.build_files import FileError, evaluate, read_conf, read_ta_elf, read_ta_header
from optee.memory.console import CORE_HEAP, NOT_MEMORY, TA_STACK, TABLES, read_console

CONF = """\
# made by the build
export CFG_ARM64_core=y
CFG_NUM_THREADS ?= 32
CFG_CORE_HEAP_SIZE=0x40000   # 256 KiB
CFG_CORE_PREALLOC_EL0_TBLS = n
CFG_TZDRAM_SIZE := 0x01000000
CFG_VIRTUALIZATION=y
CFG_UNKNOWN=whatever
arm64-platform-cppflags += -DARM64=1
"""


def test_a_conf_of_a_build() -> None:
    found = read_conf(CONF, "conf.mk")
    build = found.onto(Build(lpae=False, prealloc=True, virtualization=False))
    assert (build.threads, build.heap, build.secure_ram) == (32, 256 << 10, 16 << 20)
    assert (build.lpae, build.prealloc, build.virtualization) == (True, False, True)
    assert found.lines["heap"] == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("CFG_NUM_THREADS=8\n  what is this", "c:2:3: 'what is this' is no line of a makefile"),
        ("CFG_NUM_THREADS 8\nCFG_CORE_HEAP_SIZE=65536", "c:1:1: 'CFG_NUM_THREADS 8' is no line of a makefile"),
        ("CFG_NUM_THREADS=many", "c:1: CFG_NUM_THREADS: 'many' is no number"),
        ("\nCFG_NUM_THREADS=0", "c:2: CFG_NUM_THREADS: 0 is not from 1 to 1024"),
        ("CFG_WITH_LPAE=yes", "c:1: CFG_WITH_LPAE: 'yes' is neither y nor n"),
        ("CFG_CORE_HEAP_SIZE=(1<<99)", "c:1: CFG_CORE_HEAP_SIZE: '(1<<99)' is no number"),
        ("hello", "c:1:1: 'hello' is no line of a makefile"),
        ("HELLO=1", "c: no line of it sets a CFG_ option"),
    ],
)
def test_a_bad_conf(text: str, error: str) -> None:
    with pytest.raises(FileError) as raised:
        read_conf(text, "c")
    assert str(raised.value) == error


HEADER = """\
#define TA_UUID HELLO_UUID
#define TA_FLAGS (TA_FLAG_SINGLE_INSTANCE | \\
                  TA_FLAG_MULTI_SESSION)
#define TA_STACK_SIZE (2 * 1024)  /* bytes */
#define TA_DATA_SIZE (32UL * 1024)
"""


def test_a_header() -> None:
    ta = read_ta_header(HEADER, "h")
    assert (ta.stack, ta.heap, ta.single_instance) == (2048, 32768, True)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("(2 * 1024)", "STACK", "h:3: TA_STACK_SIZE: 'STACK' is no number"),
        ("TA_DATA_SIZE", "TA_DATA", "h: does not define TA_DATA_SIZE"),
        ("(32UL * 1024)", "0", "h:4: TA_DATA_SIZE: 0 is no size of a TA"),
    ],
)
def test_a_bad_header(old: str, new: str, error: str) -> None:
    with pytest.raises(FileError) as raised:
        read_ta_header(HEADER.replace(old, new), "h")
    assert str(raised.value) == error


def elf(head: bytes, segments: list[tuple[int, int, int]]) -> bytes:
    """An ELF file with a section .ta_head; segments by flags, address and size."""
    names = b"\0.ta_head\0"
    programs_at, names_at = 64, 64 + 56 * len(segments)
    head_at = names_at + len(names)
    sections_at = head_at + len(head)
    fields = (2, 183, 1, 0, programs_at, sections_at, 0, 64, 56, len(segments), 64, 3, 2)
    file = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", *fields)
    for flags, address, memory in segments:
        file += struct.pack("<IIQQQQQQ", 1, flags, 0, address, address, memory, memory, 4096)
    file += names + head
    file += bytes(64)
    file += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, head_at, len(head), 0, 0, 0, 0)
    return file + struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, names_at, len(names), 0, 0, 0, 0)


TA_ELF = elf(struct.pack("<16sIIQ", b"uuid", 3000, 0xC, 0), [(5, 0, 0x12345), (6, 0x13000, 0x9100)])


def test_an_elf() -> None:
    ta = read_ta_elf(TA_ELF, "e")
    assert (ta.code, ta.stack, ta.heap, ta.single_instance) == (0x13000, 3000, 0xA000 - 0x2000, True)


@given(st.integers(0, len(TA_ELF) - 1))
def test_a_torn_elf_is_one_clear_error(end: int) -> None:
    with pytest.raises(FileError, match=r"^e: "):
        read_ta_elf(TA_ELF[:end], "e")


@given(st.binary(max_size=300))
def test_any_bytes_are_no_ta(data: bytes) -> None:
    with pytest.raises(FileError):
        read_ta_elf(b"\x7fELF" + data, "e")


@given(st.text(max_size=40))
def test_a_number_or_a_value_error(text: str) -> None:
    try:
        assert isinstance(evaluate(text), int)
    except ValueError as error:
        assert "number" in str(error)


LOG = """\
E/TC:? 0 alloc_pgt:235 18 page tables not available
E/TC:0 0 Memory allocation failed: size 512 context 0xe17a3c8
E/TC:? 0 TA panicked with code 0xffff300f
E/LD:  Status of TA 9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b01
E/TC:? 0 User mode data-abort at address 0x40014ff8 (translation fault)
E/LD:   region  0: va 0x40005000 pa 0x0e300000 size 0x002000 flags rw-s (ldelf)
E/LD:   region  1: va 0x40015000 pa 0x0e302000 size 0x001000 flags rw-s (stack)
E/LD:   region  2: va 0x40016000 pa 0x0e303000 size 0xebe8000 flags rw-s [0]
"""


def test_messages_of_the_console() -> None:
    found = [(finding.line, finding.limit) for finding in read_console(LOG)]
    assert found == [(1, TABLES), (2, CORE_HEAP), (3, NOT_MEMORY), (6, TABLES), (6, TA_STACK)]
    texts = [finding.text for finding in read_console(LOG)]
    assert "CFG_NUM_THREADS=9 " in texts[0]
    assert "512 bytes" in texts[1]
    assert "118 tables, so 59 threads" in texts[3]


@pytest.mark.parametrize("prefix", ["E/TC:? 0 alloc_pgt:116 ", "E/TC:? 0 ", ""])
def test_tables_without_a_number_are_not_counted_by_the_number_of_a_source_line(prefix: str) -> None:
    (finding,) = read_console(f"{prefix}Page tables are not available\n")
    assert finding.limit == TABLES and not any(digit in finding.text for digit in ("116", " 58", "=0"))


def test_statistics_name_the_pool_that_failed() -> None:
    stats = "Pool: {}\nSize of pool: 65536\nNumber of failed allocations: {}\nSize of larges allocation failure: 4096\n"
    assert read_console(stats.format("Heap", 0)) == []
    (finding,) = read_console(stats.format("Heap", 3))
    assert (finding.limit, finding.line) == (CORE_HEAP, 1)
    assert "CFG_CORE_HEAP_SIZE" in finding.text
    (finding,) = read_console(stats.format("KHeap", 3))
    assert "CFG_CORE_NEX_HEAP_SIZE" in finding.text


def test_a_pool_size_alone_says_nothing_about_the_core() -> None:
    (finding,) = read_console("Size of pool 68720\n")
    assert "not the core's" in finding.text


def test_what_else_stands_in_a_makefile_is_no_mistake() -> None:
    text = """\
include mk/base.mk
-include local.mk
ifeq ($(CFG_X),y)
CFG_NUM_THREADS ?= 8
else
endif
$(call force,CFG_Y,y)
flags += -DONE \\
  -DTWO three
all: one two
\techo a recipe
"""
    assert read_conf(text, "conf.mk").values == {"threads": 8}
