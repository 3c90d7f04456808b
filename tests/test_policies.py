"""Policies: the built-in ones say what the rules demand, and a user's own is checked as a whole."""

import tracemalloc
from pathlib import Path

import pytest

from hv_models.machine import Machine
from mediator.core.mediator import Mediator
from mediator.core.policy import ANY_GUEST, FlowPolicy, Policy, Word
from mediator.documents import DocumentError
from mediator.host import Host
from mediator.policies import BUILT_IN, load_policy, policy_text
from optee.abi.message import Command, ParamType
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, NsecCapability, SecCapability

XEN_FUNCTIONS = {
    Function.CALLS_COUNT,
    Function.CALLS_UID,
    Function.CALLS_REVISION,
    Function.GET_OS_UUID,
    Function.GET_OS_REVISION,
    Function.ENABLE_SHM_CACHE,
    Function.DISABLE_SHM_CACHE,
    Function.GET_SHM_CONFIG,
    Function.EXCHANGE_CAPABILITIES,
    Function.CALL_WITH_ARG,
    Function.RETURN_FROM_RPC,
}
OF_THE_HYPERVISOR = {
    Function.VM_CREATED,
    Function.VM_DESTROYED,
    Function.BOOT_SECONDARY,
    Function.L2CC_MUTEX,
    Function.LOAD_IMAGE,
    Function.GET_PROTMEM_CONFIG,
}


def errors(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(DocumentError) as caught:
        load_policy(str(path))
    assert all(line.startswith(f"{path}:") and "\n" not in line for line in caught.value.lines)
    return caught.value.lines


def changed(old: str, new: str, name: str = "default") -> str:
    text = policy_text(name)
    assert old in text, old
    return text.replace(old, new, 1)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_policy_keeps_the_rules(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name and policy.purpose
    assert not policy.functions & OF_THE_HYPERVISOR
    offered = policy.sec_capabilities
    assert not offered & (SecCapability.HAVE_RESERVED_SHM | SecCapability.VIRTUALIZATION)
    assert not offered & (SecCapability.PROTMEM | SecCapability.DYNAMIC_PROTMEM)
    assert offered & SecCapability.DYNAMIC_SHM
    # R4: offered if and only if it is handled.
    assert (SecCapability.RPC_ARG in offered) == (Function.CALL_WITH_RPC_ARG in policy.functions)
    assert (SecCapability.RPC_ARG in offered) == (Function.CALL_WITH_REGD_ARG in policy.functions)
    assert (SecCapability.ASYNC_NOTIF in offered) == (Function.ENABLE_ASYNC_NOTIF in policy.functions)
    assert (SecCapability.ASYNC_NOTIF in offered) == (Function.GET_ASYNC_NOTIF_VALUE in policy.functions)
    assert Function.GET_SHM_CONFIG in policy.functions  # answered here: ENOTAVAIL
    assert {function.name for function in Function} <= policy.answers.keys()
    assert policy.register_attributes <= {0x209, 0x20A, 0x20B} and 0x20A in policy.register_attributes
    machine = Machine()
    Mediator(policy, Host(machine))  # handles each of its functions
    machine.close()


def test_the_default_policy_is_what_the_design_says() -> None:
    policy = load_policy("default")
    assert policy.sec_capabilities == (
        SecCapability.DYNAMIC_SHM | SecCapability.MEMREF_NULL | SecCapability.ASYNC_NOTIF | SecCapability.RPC_ARG
    )
    limits = policy.limits
    assert (limits.pages, limits.buffers, limits.pages_per_buffer) == (65536, 1024, 16384)
    assert limits.calls is None and limits.rpc_arguments is None
    assert policy.register_attributes == {0x20A}
    assert policy.unregister_attributes == {int(ParamType.RMEM_INPUT), int(ParamType.RMEM_OUTPUT), 7}
    assert not policy.cookie_zero and not policy.compare_resume_cookie
    assert policy.rpc_commands is not None
    assert not {RpcCommand.RPMB_PROBE_RESET, RpcCommand.RPMB_PROBE_NEXT, RpcCommand.RPMB_FRAMES} & policy.rpc_commands
    assert Command.DO_BOTTOM_HALF in policy.commands and Command.STOP_ASYNC_NOTIF in policy.commands


def test_the_xen_policy_is_the_references() -> None:
    policy = load_policy("xen")
    assert policy.functions == XEN_FUNCTIONS and len(policy.functions) == 11
    assert int(policy.sec_capabilities) == 0x16
    assert policy.nsec_capabilities == NsecCapability.UNIPROCESSOR
    assert (policy.limits.pages, policy.limits.buffers, policy.limits.pages_per_buffer) == (16383, 16, 129)
    assert policy.register_attributes == {0x209, 0x20A, 0x20B} and policy.unregister_attributes is None
    assert policy.cookie_zero and policy.compare_resume_cookie
    assert policy.rpc_commands is None
    assert policy.commands == {Command(number) for number in range(6)}
    keep, passed = Word.KEEP, Word.PASS
    assert policy.answers["completed"] == (keep, keep, keep)
    assert policy.answers["suspended"] == (passed, passed, passed)
    assert policy.answers["GET_OS_REVISION"] == (passed, keep, keep)
    assert policy.answers["DISABLE_SHM_CACHE"][:2] == (passed, passed)


def test_the_text_that_is_shown_is_the_policy(tmp_path: Path) -> None:
    for name in BUILT_IN:
        path = tmp_path / f"{name}.yml"
        path.write_text(policy_text(name))
        assert load_policy(str(path)) == load_policy(name)


def test_a_users_policy(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(changed("pages: 65536", "pages: 100").replace("name: default", "name: own"))
    policy: Policy = load_policy(str(path))
    assert policy.name == "own" and policy.limits.pages == 100
    assert policy.functions == load_policy("default").functions


def test_guests_may_have_limits_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    quotas = "guests:\n  kvm-1: {pages: 100, reserved_pages: 20, memory_kib: 64}\n  xen-2: {calls: 3}\n"
    path.write_text(changed("pool:", quotas + "pool:").replace("  pages: null", "  pages: 5000"))
    policy = load_policy(str(path))
    first, second, third = (policy.limits_of(name) for name in ("kvm-1", "xen-2", "kvm-3"))
    assert (first.pages, first.reserved_pages, first.memory, first.buffers) == (100, 20, 64 << 10, 1024)
    assert (second.calls, second.pages) == (3, 65536) and third == policy.limits
    assert policy.pool_pages == 5000


@pytest.mark.parametrize(
    ("quotas", "line", "words"),
    [
        ("guests:\n  kvm-1: {pages: 0}\n", 2, "pages"),
        ("guests:\n  kvm-1: {pags: 1}\n", 2, "pags"),
        ("guests:\n  kvm-1:\n    pages: 10\n    reserved_pages: 11\n", 2, "11 of at most 10"),
        ("guests: 5\n", 1, "guests"),
    ],
)
def test_limits_of_single_guests_are_checked(quotas: str, line: int, words: str, tmp_path: Path) -> None:
    text = changed("pool:", quotas + "pool:")
    (error,) = errors(tmp_path, text)
    assert words in error
    assert int(error.split(":")[1]) == text[: text.index(quotas)].count("\n") + line


def test_flow_control_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(changed("flow: null", "flow: {queue: 3, rate: 2.5, burst: 4, park_ms: 5, secure_cores: 1}"))
    assert load_policy(str(path)).flow == FlowPolicy(3, 2.5, 4, 5_000_000, 1)
    path.write_text(changed("flow: null", "flow: {queue: 3}"))
    assert load_policy(str(path)).flow == FlowPolicy(3, None, 1, 2_000_000, None)


@pytest.mark.parametrize(
    "key", ["queue: 0", "rate: 0", "rate: 0.5", "rate: -1", "burst: 0", "park_ms: 0", "secure_cores: 0", "cores: 1"]
)
def test_a_policy_that_could_starve_a_guest_is_refused(key: str, tmp_path: Path) -> None:
    queue = "" if key.startswith("queue") else "  queue: 4\n"
    text = changed("flow: null", f"flow:\n{queue}  {key}\n#")
    (line,) = errors(tmp_path, text)
    name = key.partition(":")[0]
    assert f"flow.{name}" in line
    assert int(line.split(":")[1]) == text[: text.index(f"  {key}")].count("\n") + 1


# R4 and what belongs together


@pytest.mark.parametrize("capability", ["HAVE_RESERVED_SHM", "VIRTUALIZATION", "PROTMEM", "DYNAMIC_PROTMEM"])
def test_a_capability_that_nobody_handles_is_not_offered(capability: str, tmp_path: Path) -> None:
    (line,) = errors(tmp_path, changed("sec: [DYNAMIC_SHM", f"sec: [{capability}, DYNAMIC_SHM"))
    assert capability in line and "R4" in line


@pytest.mark.parametrize(
    "function", ["CALL_WITH_RPC_ARG", "CALL_WITH_REGD_ARG", "ENABLE_ASYNC_NOTIF", "GET_ASYNC_NOTIF_VALUE"]
)
def test_a_capability_needs_its_functions(function: str, tmp_path: Path) -> None:
    (line,) = errors(tmp_path, changed(f"  - {function}\n", ""))
    assert function in line and "R4" in line


@pytest.mark.parametrize("capability", ["RPC_ARG", "ASYNC_NOTIF"])
def test_functions_need_their_capability(capability: str, tmp_path: Path) -> None:
    (line,) = errors(tmp_path, changed(f", {capability}", ""))
    assert capability in line and "R4" in line


def test_rpmb_probing_needs_its_rpc_commands(tmp_path: Path) -> None:
    (line,) = errors(tmp_path, changed("RPC_ARG]", "RPC_ARG, RPMB_PROBE]"))
    assert "RPMB_PROBE" in line and "R4" in line
    text = changed("RPC_ARG]", "RPC_ARG, RPMB_PROBE]").replace(
        "  - I2C_TRANSFER\n", "  - I2C_TRANSFER\n  - RPMB_PROBE_RESET\n  - RPMB_PROBE_NEXT\n  - RPMB_FRAMES\n"
    )
    path = tmp_path / "rpmb.yaml"
    path.write_text(text)
    assert SecCapability.RPMB_PROBE in load_policy(str(path)).sec_capabilities


def test_a_call_needs_a_way_to_go_on(tmp_path: Path) -> None:
    assert any("RETURN_FROM_RPC" in line for line in errors(tmp_path, changed("  - RETURN_FROM_RPC\n", "")))


@pytest.mark.parametrize("name", ["completed", "suspended", "failed", "local"])
def test_every_status_has_its_answer(name: str, tmp_path: Path) -> None:
    text = "\n".join(line for line in policy_text("default").splitlines() if not line.strip().startswith(f"{name}:"))
    (line,) = errors(tmp_path, text)
    assert name in line


@pytest.mark.parametrize("function", [function.name for function in sorted(OF_THE_HYPERVISOR)])
def test_functions_of_the_hypervisor_are_no_guests(function: str, tmp_path: Path) -> None:
    """In one line, before anything runs: not as an error of the mediator when it starts."""
    (line,) = errors(tmp_path, changed("  - CALLS_COUNT\n", f"  - CALLS_COUNT\n  - {function}\n"))
    assert function in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("- CALLS_COUNT", "- CALLS_COUNTS", "CALLS_COUNTS"),
        ("- CALLS_COUNT", "- 0xbf00ff00", "name"),
        ("- OPEN_SESSION", "- OPEN", "OPEN"),
        ("- LOAD_TA", "- LOAD", "LOAD"),
        ("sec: [DYNAMIC_SHM", "sec: [DYNAMIC", "DYNAMIC"),
        ("nsec: null", "nsec: [MULTIPROCESSOR]", "MULTIPROCESSOR"),
        ("CALLS_UID: [pass, pass, pass]", "CALLS_UID: [pass, pass]", ""),
        ("CALLS_UID: [pass, pass, pass]", "CALLS_UID: [pass, pass, pass, pass]", ""),
        ("CALLS_UID: [pass, pass, pass]", "CALLS_UID: [pass, pass, forget]", "forget"),
        ("CALLS_UID: [pass, pass, pass]", "CALLS_UIDS: [pass, pass, pass]", "CALLS_UIDS"),
        ("pages: 65536", "pages: 0", "pages"),
        ("pages: 65536", "pages: -1", "pages"),
        ("pages: 65536", "pages: 65536.0", "pages"),
        ("pages: 65536", "pages: '65536'", "pages"),
        ("pages: 65536", "pages: 99999999999999999999", "pages"),
        ("pages: 65536", "pages: 0200000", "0200000"),
        ("pages: 65536", "pages: yes", "yes"),
        ("pages: 65536", "pags: 65536", "pags"),
        ("reserved_pages: 0", "reserved_pages: 65537", "65537 of at most 65536"),
        ("reserved_pages: 0", "reserved_pages: -1", "reserved_pages"),
        ("  pages: null", "  pages: 0", "pages"),
        ("calls: null", "calls: 0", "calls"),
        ("memory_kib: 4096", "memory_kib: 1", "memory_kib"),
        ("cookie_zero: false", "cookie_zero: 0", "cookie_zero"),
        ("cookie_zero: false", "cookie_zero: no", "no"),
        ("[0x20a]", "[0x30a]", "META"),
        ("[0x20a]", "[-1]", "register_attributes"),
        ("[0x20a]", "0x20a", "register_attributes"),
        ("name: default", "name: 5", "name"),
        ("name: default", "name: default\nname: other", "twice"),
        ("name: default", "title: default", "name"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = changed(old, new)
    lines = errors(tmp_path, text)
    assert any(words in line for line in lines), lines
    assert len(lines) <= 2
    for line in lines:
        row, column = line.removeprefix(f"{tmp_path / 'own.yaml'}:").split(":")[:2]
        assert 1 <= int(row) <= text.count("\n") + 1 and int(column) >= 1


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    text = changed("pages: 65536", "pages: many").replace("buffers: 1024", "buffers: 0").replace("- LOAD_TA", "- LOADS")
    assert len(errors(tmp_path, text)) == 3


# Files


@pytest.mark.parametrize("name", ["", "Default", "default.", "none", "xen.json", "../default", "/etc"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load_policy(name)
    (line,) = caught.value.lines
    assert "default, xen, minimal" in line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.yaml", "No such file"), (tmp_path / "dir.yaml", "directory")):
        if words == "directory":
            path.mkdir()
        with pytest.raises(DocumentError) as caught:
            load_policy(str(path))
        assert words in caught.value.lines[0]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00\x01", b"", b"- 1\n", b"name: [", b"\x1f\x8b\x08"])
def test_a_file_that_is_no_policy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(DocumentError) as caught:
        load_policy(str(path))
    assert all(line.startswith(str(path)) and "\n" not in line for line in caught.value.lines)


def test_a_file_of_a_hundred_megabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(DocumentError) as caught:
            load_policy(str(path))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert len(caught.value.lines) == 1


def test_the_owner_of_the_rpmb_device(tmp_path: Path) -> None:
    assert load_policy("default").rpmb_owner is None
    assert load_policy("minimal").rpmb_owner is None
    assert load_policy("xen").rpmb_owner == ANY_GUEST
    path = tmp_path / "owner.yaml"
    path.write_text(changed("rpmb_owner: null", "rpmb_owner: kvm-1"), encoding="utf-8")
    assert load_policy(str(path)).rpmb_owner == "kvm-1"
    for wrong in ('""', "[kvm-1, kvm-2]", "7"):
        (line, *_) = errors(tmp_path, changed("rpmb_owner: null", f"rpmb_owner: {wrong}"))
        assert "rpmb_owner" in line
