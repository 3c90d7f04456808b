"""All built-in TAs."""

from __future__ import annotations

from typing import Final

from optee.tas.acipher import Acipher
from optee.tas.aes import Aes
from optee.tas.concurrent import Concurrent, ConcurrentLarge
from optee.tas.devices import DeviceEnumeration
from optee.tas.exercise import (
    BigHeapTa,
    ExerciseTa,
    KeepAliveTa,
    KeepCrashedTa,
    SingleInstanceTa,
    SingleSessionTa,
)
from optee.tas.hello_world import HelloWorld
from optee.tas.hotp import Hotp
from optee.tas.invoke_tests import InvokeTests
from optee.tas.load import AllocatingTa, ReusingTa, StackExhaustionTa, StackSmashTa
from optee.tas.random import Random
from optee.tas.rng import RandomNumberGenerator
from optee.tas.secure_storage import SecureStorage
from optee.tas.secure_storage_test import StorageTest, StorageTest2
from optee.tas.statistics import Statistics
from optee.trusted_application import TrustedApplication

PSEUDO: Final[tuple[type[TrustedApplication], ...]] = (
    DeviceEnumeration,
    InvokeTests,
    RandomNumberGenerator,
    Statistics,
)
EXAMPLES: Final[tuple[type[TrustedApplication], ...]] = (HelloWorld, Random, Aes, Hotp, Acipher, SecureStorage)
"""Those of optee_examples."""
EXERCISES: Final[tuple[type[TrustedApplication], ...]] = (
    ExerciseTa,
    SingleInstanceTa,
    SingleSessionTa,
    KeepAliveTa,
    KeepCrashedTa,
    BigHeapTa,
    StorageTest,
    StorageTest2,
    AllocatingTa,
    ReusingTa,
    StackSmashTa,
    StackExhaustionTa,
    Concurrent,
    ConcurrentLarge,
)
BUILT_IN: Final = (*PSEUDO, *EXAMPLES, *EXERCISES)
