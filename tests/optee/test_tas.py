"""The TAs that are built in, by their commands."""

import struct
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPrivateNumbers,
    RSAPublicNumbers,
    rsa_crt_dmp1,
    rsa_crt_dmq1,
    rsa_crt_iqmp,
    rsa_recover_prime_factors,
)
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, CTR, ECB

from optee.abi.message import Message, Param, ParamType
from optee.abi.results import Result
from optee.config import Config
from optee.tas.acipher import Acipher, RsaKey
from optee.tas.aes import Aes
from optee.tas.devices import DeviceEnumeration
from optee.tas.exercise import ExerciseTa
from optee.tas.hello_world import HelloWorld
from optee.tas.hotp import Hotp
from optee.tas.invoke_tests import InvokeTests
from optee.tas.random import Random
from optee.tas.rng import RandomNumberGenerator
from optee.tas.statistics import Statistics
from tests.optee.rig import Rig, open_message, value

NULL = Param(ParamType.TMEM_OUTPUT, 0, 0, 0)
IN, OUT, INOUT = ParamType.RMEM_INPUT, ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT
COOKIE = 7


class Client(Rig):
    """A rig with a buffer of 8 KiB that is registered: inputs at its beginning, outputs behind 4 KiB."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(Config(seed=seed))
        self.data, listed = self.buffer(8192)
        assert self.register(listed, 8192, COOKIE).ret == 0

    def source(self, data: bytes, kind: ParamType = IN) -> Param:
        self.memory.write(self.data, data)
        return Param(kind, 0, len(data), COOKIE)

    def target(self, size: int) -> Param:
        return Param(OUT, 4096, size, COOKIE)

    def result(self, answer: Message, index: int) -> bytes:
        assert answer.ret == 0, hex(answer.ret)
        return self.memory.read(self.data + 4096, answer.params[index].b)


@pytest.fixture
def client() -> Client:
    return Client()


def number(a: int, b: int = 0) -> Param:
    return value(a, b, ParamType.VALUE_INPUT)


def test_hello_world(client: Client) -> None:
    session = client.open()
    assert client.invoke(session, 0, value(0xFFFFFFFF)).params[0].a == 0
    assert client.invoke(session, 1, value(0)).params[0].a == 0xFFFFFFFF
    assert client.invoke(session, 2, value(0)).ret == Result.BAD_PARAMETERS
    assert client.invoke(session, 0, number(1)).ret == Result.BAD_PARAMETERS
    assert client.run(open_message(HelloWorld.uuid, value(1))).ret == Result.BAD_PARAMETERS


def test_random_comes_from_the_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        client = Client(seed=seed)
        session = client.open(Random.uuid)
        drawn.append(client.result(client.invoke(session, 0, client.target(16)), 0))
        assert client.result(client.invoke(session, 0, client.target(16)), 0) != drawn[-1]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("key_size", [16, 32])
@pytest.mark.parametrize("algorithm", [0, 1, 2])
def test_aes(client: Client, algorithm: int, key_size: int) -> None:
    session = client.open(Aes.uuid)
    key, iv, text = bytes(range(key_size)), bytes(range(16)), bytes(4096)
    mode = (ECB(), CBC(iv), CTR(iv))[algorithm]
    expected = Cipher(AES(key), mode).encryptor().update(text)
    for encode, given, wanted in ((1, text, expected), (0, expected, text)):
        assert client.invoke(session, 0, number(algorithm), number(key_size), number(encode)).ret == 0
        assert client.invoke(session, 1, client.source(key)).ret == 0
        assert client.invoke(session, 2, client.source(iv)).ret == 0
        assert client.result(client.invoke(session, 3, client.source(given), client.target(4096)), 1) == wanted


def test_aes_refusals(client: Client) -> None:
    session = client.open(Aes.uuid)
    text = client.source(bytes(16))
    assert client.invoke(session, 3, text, client.target(16)).ret == Result.BAD_STATE
    for request in ((3, 16, 1), (0, 24, 1), (0, 16, 2)):
        assert client.invoke(session, 0, *map(number, request)).ret == Result.BAD_PARAMETERS
    client.invoke(session, 0, number(1), number(16), number(1))
    assert client.invoke(session, 1, client.source(bytes(17))).ret == Result.BAD_PARAMETERS
    assert client.invoke(session, 3, text, client.target(15)).ret == Result.BAD_PARAMETERS
    assert client.invoke(session, 3, text, client.target(16)).ret == Result.TARGET_DEAD


def test_hotp_gives_the_values_of_rfc_4226(client: Client) -> None:
    session = client.open(Hotp.uuid)
    output = value(kind=ParamType.VALUE_OUTPUT)
    assert client.invoke(session, 1, output).ret == Result.BAD_PARAMETERS
    assert client.invoke(session, 0, client.source(bytes(65))).ret == Result.BAD_PARAMETERS
    assert client.invoke(session, 0, client.source(b"12345678901234567890")).ret == 0
    expected = [755224, 287082, 359152, 969429, 338314, 254676, 287922, 162583, 399871, 520489]
    assert [client.invoke(session, 1, output).params[0].a for _ in range(10)] == expected


def test_acipher(client: Client) -> None:
    session = client.open(Acipher.uuid)
    text = client.source(b"a secret")
    assert client.invoke(session, 1, text, client.target(512)).ret == Result.BAD_STATE
    for size in (255, 4097):
        assert client.invoke(session, 0, number(size)).ret == Result.NOT_SUPPORTED
    assert client.invoke(session, 0, number(1024)).ret == 0
    short = client.invoke(session, 1, text, NULL)
    assert (short.ret, short.params[1].b) == (Result.SHORT_BUFFER, 128)
    cipher = client.result(client.invoke(session, 1, text, client.target(128)), 1)
    key = client.world._by_id[1].sessions.open[session].tee.context
    assert isinstance(key, RsaKey)
    assert private_key(key).decrypt(cipher, padding.PKCS1v15()) == b"a secret"
    assert client.invoke(session, 1, client.source(bytes(118)), client.target(128)).ret == Result.BAD_PARAMETERS


def private_key(key: RsaKey) -> RSAPrivateKey:
    p, q = rsa_recover_prime_factors(key.modulus, 65537, key.private_exponent)
    d = key.private_exponent
    numbers = RSAPrivateNumbers(
        p,
        q,
        d,
        rsa_crt_dmp1(d, p),
        rsa_crt_dmq1(d, q),
        rsa_crt_iqmp(p, q),
        RSAPublicNumbers(65537, key.modulus),
    )
    return numbers.private_key()


def test_device_enumeration(client: Client) -> None:
    session = client.open(DeviceEnumeration.uuid)
    asked = client.invoke(session, 0, NULL)
    assert (asked.ret, asked.params[0].b) == (Result.SHORT_BUFFER, 16)
    assert client.result(client.invoke(session, 0, client.target(16)), 0) == RandomNumberGenerator.uuid.bytes
    for command in (1, 2):
        empty = client.invoke(session, command, NULL)
        assert (empty.ret, empty.params[0].b) == (0, 0)


def test_random_number_generator(client: Client) -> None:
    session = client.open(RandomNumberGenerator.uuid)
    before = client.memory.read(client.data, 32)
    assert client.invoke(session, 0, Param(INOUT, 0, 32, COOKIE)).ret == 0
    assert client.memory.read(client.data, 32) != before
    assert client.invoke(session, 1, value(kind=ParamType.VALUE_OUTPUT)).params[0].a > 0


def test_invoke_tests(client: Client) -> None:
    session = client.open(InvokeTests.uuid)
    assert [client.invoke(session, command).ret for command in (2, 11, 12)] == [0, 0, Result.NOT_SUPPORTED]
    data = bytes((n + 1) & 0xFF for n in range(4096))
    assert client.invoke(session, 1, client.source(data, INOUT)).ret == 0
    assert client.memory.read(client.data, 2) == bytes([sum(data) & 0xFF, 2])
    assert client.invoke(session, 1, value(3, 4)).params[0].a == 7
    null = Param(ParamType.TMEM_INOUT, 0, 0, 0)
    assert client.invoke(session, 10, null).ret == 0
    for bad in (client.invoke(session, 1, null), client.invoke(session, 10, client.source(b"x", INOUT))):
        assert bad.ret == Result.BAD_PARAMETERS


def test_statistics(client: Client) -> None:
    session, ta = client.open(Statistics.uuid), client.open(ExerciseTa.uuid)
    client.invoke(ta, 3, number(1000, 1))
    client.invoke(ta, 3, number(1 << 20, 1))
    record = client.result(client.invoke(session, 3, client.target(4096)), 0)
    uuid, panicked, sessions, name, _, *heap = struct.unpack("<16sII32sQ6I", record)
    assert UUID(bytes_le=uuid) == ExerciseTa.uuid
    assert (panicked, sessions, name.rstrip(b"\0")) == (0, 1, b"heap")
    assert heap == [1000, 1000, 32 << 10, 1, 1 << 20, 1000]
    output = value(kind=ParamType.VALUE_OUTPUT)
    assert client.invoke(session, 4, output, output).params[0].a == 1700000000


def test_own_ta_in_twenty_lines() -> None:
    """The example of the documentation, as it stands there."""
    import optee.trusted_application as module

    assert module.__doc__ is not None
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    source = "from uuid import UUID\nfrom optee.trusted_application import *\nfrom optee.tee import Tee\n"
    assert len(lines) <= 20
    names: dict[str, Any] = {}
    exec(source + "\n".join(lines), names)
    rig = Rig(Config(extra_tas=(names["Adder"],)))
    session = rig.open(names["Adder"].uuid)
    added = rig.invoke(session, 0, number(0xFFFFFFFF), number(3), value(kind=ParamType.VALUE_OUTPUT))
    assert added.params[2].a == 2
    assert rig.invoke(session, 1, number(5)).ret == 0


def test_statistics_of_pools(client: Client) -> None:
    layout = struct.Struct("<32sQ6I")
    session, ta = client.open(Statistics.uuid), client.open(ExerciseTa.uuid)
    everything = client.result(client.invoke(session, 1, number(0, 0), client.target(4096)), 1)
    records = [layout.unpack_from(everything, at) for at in range(0, len(everything), layout.size)]
    assert [record[0].rstrip(b"\0") for record in records] == [
        b"Heap",
        b"Public DDR (deprecated)",
        b"Physical TA memory",
        b"KHeap",
        b"RPMB secure storage (no data)",
    ]
    _, squares, allocated, most, size, failed, biggest, at_biggest = records[0]
    assert 0 < allocated <= most < size == client.world.config.core_heap_size
    assert (failed, biggest, at_biggest) == (0, 0, 0)
    assert 0 < squares <= size * size
    # A reset begins anew; what is allocated stays.
    client.invoke(ta, 14, number(3, 10), value(kind=ParamType.VALUE_OUTPUT))
    client.invoke(ta, 15)
    for wanted in (allocated + 10 * 9424, allocated):
        record = layout.unpack(client.result(client.invoke(session, 1, number(1, 1), client.target(64)), 1))
        assert (record[2], record[3] >= wanted) == (allocated, True)
    assert record[3] < allocated + 9424
    assert client.invoke(session, 1, number(6, 0), client.target(4096)).ret == Result.BAD_PARAMETERS
    short = client.invoke(session, 1, number(0, 0), client.target(100))
    assert (short.ret, short.params[1].b) == (Result.SHORT_BUFFER, 5 * layout.size)
    assert client.invoke(session, 2).ret == 0
    assert any("session of guest 1" in line for line in client.world.console)
