"""Every number of the ABI, compared with the facts both ways."""

import importlib
import pkgutil
from enum import IntEnum, IntFlag

import pytest
from hypothesis import given
from hypothesis import strategies as st

import optee.abi
from optee.abi import message, results, rpc, rpmb, smc
from optee.abi.registers import Named

from .facts import ABI, values

MSG = ABI["msg"]
RPC = ABI["rpc_commands"]

ENUMERATIONS = {
    smc.Function: {name: entry["id"] for name, entry in ABI["smc_functions"].items() if "id" in entry},
    smc.ReturnCode: values(ABI["smc_return_codes"]),
    smc.RpcReturn: {name: entry["a0"] for name, entry in ABI["rpc_returns"].items() if "a0" in entry},
    smc.NsecCapability: {name: 1 << entry["bit"] for name, entry in ABI["capabilities"]["nsec"].items()},
    smc.SecCapability: {name: 1 << entry["bit"] for name, entry in ABI["capabilities"]["sec"].items()},
    message.Command: values(MSG["commands"]),
    message.ParamType: MSG["attr"]["types"],
    message.Login: MSG["login"],
    message.ProtmemUseCase: MSG["protmem_use_case"],
    rpc.RpcCommand: values(RPC),
    rpc.FsOperation: values(RPC["FS"]["sub"]),
    rpc.NotificationOperation: values(RPC["NOTIFICATION"]["sub"]),
    rpc.SocketOperation: values(RPC["SOCKET"]["sub"]),
    rpc.PluginOperation: values(RPC["SUPP_PLUGIN"]["sub"]),
    rpc.SocketTimeout: RPC["SOCKET"]["timeouts"],
    rpc.ShmType: RPC["SHM_ALLOC"]["types"],
    results.Result: ABI["tee_results"],
    results.Origin: MSG["origins"],
    results.TaFlag: values(ABI["ta_flags"], skip=["mask"]),
    results.StorageId: ABI["storage_ids"],
}
# JEDEC's, not OP-TEE's, but for RpmbOperation, which is the tee-supplicant's.
OF_EMMC = {
    rpmb.FrameType: {"PROGRAM_KEY": 1, "READ_COUNTER": 2, "WRITE": 3, "READ": 4, "READ_RESULT": 5},
    rpmb.FrameResult: dict(
        zip(("OK", "GENERAL", "AUTHENTICATION", "COUNTER", "ADDRESS", "WRITE", "READ", "NO_KEY"), range(8), strict=True)
    ),
    rpmb.RpmbOperation: {"DATA": 0, "DEVICE_INFO": 1},
}
# RPC commands have `max_params` among them, a number that is no command.
del ENUMERATIONS[rpc.RpcCommand]["max_params"]


@pytest.mark.parametrize("enumeration", ENUMERATIONS | OF_EMMC, ids=lambda enumeration: enumeration.__name__)
def test_an_enumeration_is_exactly_the_facts(enumeration):
    facts = (ENUMERATIONS | OF_EMMC)[enumeration]
    assert {name: int(member) for name, member in enumeration.__members__.items()} == facts


def test_no_enumeration_escapes_the_comparison():
    modules = [importlib.import_module(f"optee.abi.{entry.name}") for entry in pkgutil.iter_modules(optee.abi.__path__)]
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, IntEnum | IntFlag)
    }
    assert found - {IntEnum, IntFlag, Named} == {*ENUMERATIONS, smc.Owner, *OF_EMMC}


def test_the_owners_of_trusted_os_calls():
    # The other owners are Arm's (DEN0028), not OP-TEE's.
    facts = ABI["meta"]["smccc"]
    assert facts["owner_trusted_os"] == smc.Owner.TRUSTED_OS
    assert facts["owner_trusted_os_api"] == smc.Owner.TRUSTED_OS_API


def test_the_parts_of_a_function_id():
    facts = ABI["meta"]["smccc"]
    identity = smc.FunctionId
    assert identity.fast.mask == 1 << facts["fast_bit"]
    assert identity.smc64.mask == 1 << facts["smc64_bit"]
    assert identity.owner.mask == facts["owner_mask"] << facts["owner_shift"]
    assert identity.number.mask == facts["func_mask"]


@pytest.mark.parametrize("function", smc.Function, ids=str)
def test_a_function_is_fast_or_yielding_as_the_facts_say(function):
    identity = smc.FunctionId(function)
    assert bool(identity.fast) == (ABI["smc_functions"][function.name]["kind"] == "fast")
    assert not identity.smc64
    assert not identity.unknown
    assert identity.owner in (smc.Owner.TRUSTED_OS, smc.Owner.TRUSTED_OS_API)


def test_constants_of_the_smc_abi():
    def words(name):
        return tuple(ABI["smc_functions"][name]["ret"][f"a{register}"] for register in range(4))

    assert words("CALLS_UID") == smc.API_UID
    assert words("GET_OS_UUID") == smc.OS_UUID
    revision = ABI["smc_functions"]["CALLS_REVISION"]["ret"]
    assert (revision["a0"], revision["a1"]) == smc.API_REVISION
    assert ABI["meta"]["hyp_client_id"]["hypervisor"] == smc.HYPERVISOR_CLIENT_ID
    assert ABI["unknown_function_behaviour"]["fast"] == smc.ReturnCode.UNKNOWN_FUNCTION
    assert f"OPTEE_SMC_SHM_CACHED={smc.SHM_CACHED}" in ABI["smc_functions"]["CALL_WITH_ARG"]["args"]["a3"]
    status = ABI["smc_functions"]["GET_ASYNC_NOTIF_VALUE"]["ret_ok"]["a2"]
    assert f"bit{smc.NotificationStatus.VALID.lsb} VALID" in status
    assert f"bit{smc.NotificationStatus.PENDING.lsb} PENDING" in status


def test_constants_of_messages_and_rpc():
    attr = MSG["attr"]
    assert attr["type_mask"] == message.TYPE_MASK == message.Attr.type.mask
    assert attr["META"] == message.META == message.Attr.META.mask
    assert attr["NONCONTIG"] == message.NONCONTIG == message.Attr.NONCONTIG.mask
    assert attr["cache_mask"] << attr["cache_shift"] == message.Attr.cache.mask
    assert attr["CACHE_PREDEFINED"] == message.CACHE_PREDEFINED
    assert MSG["fmem_invalid_global_id"] == message.FMEM_INVALID_GLOBAL_ID
    assert RPC["max_params"] == rpc.RPC_PARAMS
    assert f"TEE_FS_NAME_MAX = {rpc.FS_NAME_MAX} bytes" in RPC["FS"]["name_buffer"]
    assert ABI["ta_flags"]["mask"] == results.TA_FLAGS_MASK
    with_operations = {name for name, entry in RPC.items() if isinstance(entry, dict) and "sub" in entry}
    assert {command.name for command in rpc.OPERATIONS} == with_operations


REGISTER = st.integers(0, 2**64 - 1) | st.integers(0xFFFE_FFFF, 2**32) | st.just(2**64 - 1)


@given(REGISTER)
def test_is_rpc_is_the_facts_formula_on_the_low_word(a0):
    assert smc.is_rpc(a0) == eval(ABI["smc_return_codes"]["is_rpc"], {"ret": a0 % 2**32})


@pytest.mark.parametrize("code", [*smc.RpcReturn, *smc.ReturnCode, *smc.Function], ids=str)
def test_only_rpc_returns_are_rpcs(code):
    assert smc.is_rpc(code) == isinstance(code, smc.RpcReturn)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_a_pair_carries_64_bits_and_upper_halves_do_not_count(value, junk):
    upper, lower = smc.to_pair(value)
    assert max(upper, lower) < 2**32
    assert smc.from_pair(upper, lower) == value == upper * 2**32 + lower
    assert smc.from_pair(upper | junk << 32, lower | junk << 32) == value
