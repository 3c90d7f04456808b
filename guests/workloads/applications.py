"""UUIDs and commands of the TAs that workloads use: those of optee_examples and tests."""

from enum import IntEnum
from typing import Final
from uuid import UUID

HELLO_WORLD: Final = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")
RANDOM: Final = UUID("b6c53aba-9669-4668-a7f2-205629d00f86")
AES: Final = UUID("5dbac793-f574-4871-8ad3-04331ec17f24")
SECURE_STORAGE: Final = UUID("f4e750bb-1437-4fbf-8785-8d3580c34994")
INVOKE_TESTS: Final = UUID("d96a5b40-c3e5-21e3-8794-1002a5d5c61b")
"""Pseudo TA for tests (CFG_ENABLE_EMBEDDED_TESTS): needs no image."""
EXERCISE: Final = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b01")
"""Test TA of the OP-TEE model, an instance for each session; other builds do not have it."""


class HelloWorld(IntEnum):
    """Commands of hello_world."""

    INC_VALUE = 0
    DEC_VALUE = 1


class Random(IntEnum):
    """Commands of random."""

    GENERATE = 0


class Aes(IntEnum):
    """Commands of aes: prepare with (algorithm, key size, mode) values, then key, IV, and data."""

    PREPARE = 0
    SET_KEY = 1
    SET_IV = 2
    CIPHER = 3


class SecureStorage(IntEnum):
    """Commands of secure_storage: the id of an object, and its data."""

    READ_RAW = 0
    WRITE_RAW = 1
    DELETE = 2


class InvokeTests(IntEnum):
    """Commands of the pseudo TA, as xtest uses them."""

    TRACE = 0
    PARAMS = 1
    SELF_TESTS = 2


class Exercise(IntEnum):
    """Commands of the test TA.

    Panic with a code; wait for milliseconds, cancellable if the second number says so; compute for so many portions;
    take a buffer and do nothing.
    """

    PANIC = 0
    WAIT = 1
    WORK = 6
    TAKE = 13
