"""The command line: what it prints where, how it ends, and that nobody ever sees a traceback."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mediator
from mediator.cli import run
from mediator.cli.output import BUG, CLOSED_PIPE, FAILED, GOOD, INTERRUPTED, USAGE
from mediator.documents import DocumentError
from mediator.policies import BUILT_IN, load_policy
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.smc import API_UID, Function
from tests.shared import SHARED, needs_shared

ROOT = Path(__file__).parent.parent
TRACE = SHARED / "traces" / "xen.jsonl.gz"
VECTORS = SHARED / "vectors" / "xen-visible.json.gz"
COMMANDS = ("serve", "replay", "conform", "decode", "bench", "trace", "trace show", "show", "show policy", "show abi")
MESSAGE = Message(Command.INVOKE_COMMAND, session=1, params=[Param(ParamType.VALUE_INOUT, 1, 2, 3)]).pack()

Capture = pytest.CaptureFixture[str]


def result(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: Capture, *arguments: str, code: int = GOOD) -> dict[str, Any]:
    """Standard output of a command with --json: one document and nothing else."""
    got, out, err = result(capsys, *arguments, "--json")
    assert got == code, err
    data = json.loads(out)
    assert isinstance(data, dict)
    return data


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line on standard error of a command that cannot do what it is asked for."""
    code, out, err = result(capsys, *arguments)
    assert (code, out) == (USAGE, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def small_trace(function: Function = Function.CALLS_UID, answer: tuple[int, ...] = API_UID) -> list[dict[str, Any]]:
    """Lines of a short recording: one fast call."""
    header = {"format": "optee-smc-trace/1", "between": "nothing", "rpc_params": 4}
    ram = {"ram": [{"ipa": "0x40000000", "size": "0x10000"}]}
    call = {"e": "call", "id": 0, "vcpu": 0, "regs": [hex(function), *["0x0"] * 7]}
    return [{**header, **ram}, call, {"e": "return", "id": 0, "regs": [hex(word) for word in answer]}]


def write_trace(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write_vectors(path: Path, count: int) -> dict[str, Any]:
    """Some of the recorded vectors, as a file of their own."""
    data: dict[str, Any] = json.loads(gzip.decompress(VECTORS.read_bytes()))
    data["vectors"] = data["vectors"][:count]
    data["count"] = count
    path.write_text(json.dumps(data))
    return data


@pytest.mark.parametrize("heavy", ["trio", "numpy", "construct", "structlog", "yaml"])
def test_help_and_version_import_nothing_heavy(heavy: str) -> None:
    lines = [["--version"], ["--help"], *([*command.split(), "--help"] for command in COMMANDS)]
    code = (
        "import sys\nfrom mediator.cli import run\n"
        f"for line in {lines!r}:\n    assert run(line) == 0\n    assert {heavy!r} not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_is_the_distributions(capsys: Capture) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert mediator.__version__ == project["version"]
    assert result(capsys, "--version") == (GOOD, f"mediator {project['version']}\n", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(capsys: Capture, command: str) -> None:
    code, out, err = result(capsys, *command.split(), "-h")
    assert code == GOOD and f"mediator {command}".strip() in out and not err


def test_module_runs_like_the_script() -> None:
    done = subprocess.run([sys.executable, "-m", "mediator", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mediator {mediator.__version__}\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "Missing command (see mediator --help)"),
        ("nonsense", "'nonsense'"),
        ("--nonsense", "--nonsense"),
        *((f"{command} --nonsense", "--nonsense") for command in COMMANDS),
        ("replay", "TRACE"),
        ("conform nonsense", "is no case"),
        ("trace show", "TRACE"),
        ("trace show x --mermaid", "--call"),
        ("trace show x --call one", "--call"),
        ("show policy nonsense", "'nonsense' is none of default, xen, minimal"),
        ("show schema nonsense", "'nonsense'"),
        ("bench --filter nonsense", "'nonsense'; there are fast-call"),
        ("bench --batches 0", "--batches"),
        ("serve --guests 0", "--guests"),
        ("serve --hypervisor nonsense", "'nonsense' is not one of 'kvm', 'xen', 'mixed'"),
        ("serve --workload nonsense", "'nonsense' is none of mixed"),
        ("serve --policy nonsense", "'nonsense' is none of default, xen, minimal, and no .yaml file"),
        ("decode", "registers, --message or --list"),
        ("decode 1 --message 00", "registers, --message or --list"),
        ("decode 1 --rpc", "--rpc goes with --message"),
        ("decode zz", "'zz' is no number"),
        ("decode 0x", "'0x' is no number"),
        ("decode 0x10000000000000000", "64 bits"),
        ("decode 1 2 3 4 5 6 7 8 9", "9 given"),
        ("decode --message 0", "whole bytes"),
        ("decode --message 00", "1 bytes given"),
        ("decode --message no-such-file", "No such file"),
        ("decode --list 00", "1 bytes given"),
    ],
)
def test_wrong_command_lines_get_one_clear_line(capsys: Capture, line: str, says: str) -> None:
    assert says in refused(capsys, *line.split())


def bad_files(directory: Path) -> dict[str, Path]:
    packed = gzip.compress(b'{"format": "optee-smc-trace/1"}\n' * 1000, mtime=0)
    contents = {
        "empty": b"",
        "junk": bytes(range(256)) * 16,
        "text": b"no: such\nthing\n",
        "list": b"[1, 2]\n",
        "foreign": b'{"format": "something/1"}\n',
        "truncated.gz": packed[: len(packed) // 2],
        "damaged.gz": packed[:12] + bytes(20) + packed[32:],
        "no-data.gz": packed[:3],
        "deep": b"[" * 100_000,
    }
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    (directory / "directory.yaml").mkdir()
    return {path.name: path for path in [*directory.iterdir(), directory / "missing.yaml"]}


@pytest.mark.parametrize("command", ["replay {}", "trace show {}", "conform --vectors {}"])
def test_bad_files_get_one_clear_line(capsys: Capture, tmp_path: Path, command: str) -> None:
    for path in bad_files(tmp_path).values():
        assert str(path) in refused(capsys, *command.format(path).split())


@pytest.mark.parametrize("option", ["--message", "--list"])
def test_bad_files_to_decode_get_one_clear_line(capsys: Capture, tmp_path: Path, option: str) -> None:
    (tmp_path / "odd.hex").write_text("0x123")
    for name in ("missing", "odd.hex", "."):
        refused(capsys, "decode", option, str(tmp_path / name))
    assert "larger than 16 MiB" in refused(capsys, "decode", option, "/dev/zero")


def bad_policies(directory: Path) -> dict[str, tuple[bytes, str]]:
    good = (Path(mediator.__file__).parent / "policies" / "default.yaml").read_bytes()
    return {
        "junk.yaml": (bytes(range(256)), "UTF-8"),
        "syntax.yaml": (b"name: [\n", "syntax.yaml:2:1"),
        "empty.yaml": (b"", "empty"),
        "unknown.yaml": (good + b"surprise: 1\n", "surprise"),
        "twice.yaml": (good + b"name: again\n", "twice"),
        "reserved.yaml": (good.replace(b"[DYNAMIC_SHM", b"[HAVE_RESERVED_SHM"), "HAVE_RESERVED_SHM is never offered"),
        "policy.txt": (good, "no .yaml file"),
    }


@pytest.mark.parametrize("command", ["replay {trace}", "serve --duration 0", "trace show {trace} --call 0"])
def test_bad_policies_get_clear_lines(capsys: Capture, tmp_path: Path, command: str) -> None:
    trace = write_trace(tmp_path / "trace", small_trace())
    for name, (data, says) in bad_policies(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(data)
        code, out, err = result(capsys, *command.format(trace=trace).split(), "--policy", str(path))
        assert (code, out) == (USAGE, "") and says in err
        assert all(line.startswith("error: ") and name in line for line in err.splitlines())


def test_an_own_policy_is_used(capsys: Capture, tmp_path: Path) -> None:
    _, text, _ = result(capsys, "show", "policy", "minimal")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("  - CALLS_UID\n", ""))
    trace = write_trace(tmp_path / "trace", small_trace())
    document(capsys, "replay", trace, "--policy", "minimal")
    told = document(capsys, "replay", trace, "--policy", str(path), code=FAILED)
    assert told["unexpected"] == 1 and told["first_unexpected"]["got"][0] == hex(2**64 - 1)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_trace_cut_or_changed_anywhere_is_never_our_bug(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(Path(write_trace(tmp_path / "trace", small_trace())).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=3)):
        text[place] = data.draw(st.sampled_from(b'{}[]",:x0129af\n\x00\xff'))
    path = tmp_path / "changed"
    path.write_bytes(text[: data.draw(st.integers(0, len(text)))])
    for command in (["replay", str(path)], ["trace", "show", str(path)], ["trace", "show", str(path), "--call", "0"]):
        assert run(command) in (GOOD, FAILED, USAGE)


class TestOtherEnds:
    """What is not the user's fault; `decode_registers` stands for any part of the program."""

    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
        def install(error: BaseException) -> None:
            def fail(*_: object) -> None:
                raise error

            monkeypatch.setattr("mediator.decode.decode_registers", fail)

        return install

    def test_a_bug_is_said_in_one_line(self, capsys: Capture, failing: Callable[[BaseException], None]) -> None:
        failing(RuntimeError("two\nlines"))
        code, out, err = result(capsys, "decode", "0")
        assert (code, out) == (BUG, "") and err.count("\n") == 1
        assert "bug" in err and "RuntimeError: two lines" in err and "report" in err

    def test_a_traceback_on_demand(
        self, capsys: Capture, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MEDIATOR_TRACEBACK", "1")
        failing(RuntimeError("here"))
        code, _, err = result(capsys, "decode", "0")
        assert code == BUG and "Traceback" in err

    def test_interruption(self, capsys: Capture, failing: Callable[[BaseException], None]) -> None:
        failing(KeyboardInterrupt())
        assert result(capsys, "decode", "0") == (INTERRUPTED, "", "interrupted\n")

    def test_what_a_nursery_wrapped_is_opened(self, capsys: Capture, failing: Callable[[BaseException], None]) -> None:
        failing(ExceptionGroup("nursery", [ExceptionGroup("inner", [DocumentError(["one", "two"])])]))
        assert result(capsys, "decode", "0") == (USAGE, "", "error: one\nerror: two\n")

    def test_interrupted_nursery(self, capsys: Capture, failing: Callable[[BaseException], None]) -> None:
        failing(BaseExceptionGroup("nursery", [KeyboardInterrupt()]))
        assert result(capsys, "decode", "0") == (INTERRUPTED, "", "interrupted\n")


def test_an_interruption_of_the_first_moments_is_quiet() -> None:
    code = (
        "import sys\nfrom mediator.__main__ import main\n"
        "class Interrupted:\n    def find_spec(self, name, *more):\n"
        "        if name.startswith('mediator.'):\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "interrupted\n")


def test_a_pipe_that_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mediator", "show", "abi"], stdout=writing, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "mediator", "decode", "0"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (USAGE, b"error: standard output: No space left on device\n")


def test_a_terminal_without_the_characters_sees_something() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mediator", "show", "policy"]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"minimal" in done.stdout


@given(st.integers(0, 2**64 - 1))
def test_registers_are_hexadecimal_or_decimal(number: int) -> None:
    from mediator.cli.decode import _number

    assert _number(hex(number)) == _number(str(number)) == _number(f"{number:#018X}".replace("X", "x")) == number


def on_terminal(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command with both outputs on a terminal; what the terminal saw."""
    ours, theirs = os.openpty()
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "CI", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mediator", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**base, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(theirs)
    seen = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal, suppress(OSError):
        # Linux answers EIO when the last writer is gone.
        while data := terminal.read(4096):
            seen += data
    return process.wait(), seen.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' terminals")
def test_colour_is_for_terminals_that_want_it(capsys: Capture) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    code, coloured = on_terminal("--help")
    assert code == GOOD and colour.search(coloured)
    code, plain = on_terminal("--help", NO_COLOR="1")
    assert code == GOOD and "Commands" in plain and not colour.search(plain)
    assert "\x1b" not in result(capsys, "--help")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' terminals")
def test_progress_is_for_terminals(capsys: Capture, tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace", small_trace())
    code, seen = on_terminal("replay", path, "--json")
    assert code == GOOD and "replay trace" in seen
    assert result(capsys, "replay", path, "--json")[2] == ""


def test_registers_in_words(capsys: Capture) -> None:
    code, out, err = result(capsys, "decode", hex(Function.CALL_WITH_ARG), "0", "0x40001000")
    assert code == GOOD and not err and "CALL_WITH_ARG" in out and "0x40001000" in out
    told = document(capsys, "decode", str(int(Function.CALL_WITH_ARG)), "0", "0x40001000")
    assert told["format"] == "mediator-decode/1" and told["name"] == "CALL_WITH_ARG"


def test_a_message_in_each_form_is_the_same(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = MESSAGE.hex()
    (tmp_path / "raw").write_bytes(MESSAGE)
    (tmp_path / "digits").write_text(f"0x{digits[:8]}\n{digits[8:]}\n")
    forms = [digits, f"0x{digits}", str(tmp_path / "raw"), str(tmp_path / "digits")]
    told = [document(capsys, "decode", "--message", form) for form in forms]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(MESSAGE)))
    told.append(document(capsys, "decode", "--message", "-"))
    assert all(each == told[0] for each in told) and told[0]["message"]["command"] == "INVOKE_COMMAND"
    assert document(capsys, "decode", "--rpc", "--message", digits)["rpc_argument"]["command"] == "RPMB"


def test_a_page_list_in_words(capsys: Capture) -> None:
    words = b"".join((0x40000000 + 4096 * n).to_bytes(8, "little") for n in range(3)).hex()
    assert document(capsys, "decode", "--list", words)["entries"] == 3
    assert "0x40000000 to 0x40002000" in result(capsys, "decode", "--list", words)[1]


def test_policies_are_listed_and_printed(capsys: Capture) -> None:
    code, out, _ = result(capsys, "show", "policy")
    assert code == GOOD
    for name in BUILT_IN:
        assert name in out and load_policy(name).purpose in out
        assert yaml.safe_load(result(capsys, "show", "policy", name)[1])["name"] == name


def test_the_schema_describes_the_policies(capsys: Capture) -> None:
    _, out, _ = result(capsys, "show", "schema", "policy")
    schema = json.loads(out)
    for name in BUILT_IN:
        policy = yaml.safe_load(result(capsys, "show", "policy", name)[1])
        assert set(policy) <= set(schema["properties"]) and set(schema["required"]) <= set(policy)
        assert set(policy["functions"]) <= set(schema["$defs"]["Function"]["enum"])
        assert set(policy["capabilities"]["sec"]) <= set(schema["$defs"]["SecCapability"]["enum"])


def test_the_abi_is_printed_whole(capsys: Capture) -> None:
    told = document(capsys, "show", "abi")
    names = {int(value, 16): name for name, value in told["functions"].items()}
    assert names == {int(function): function.name for function in Function}
    assert set(told) == {
        "format",
        "functions",
        "return_codes",
        "rpcs",
        "nsec_capabilities",
        "sec_capabilities",
        "commands",
        "rpc_commands",
        "attribute_types",
        "results",
        "origins",
    }
    _, out, _ = result(capsys, "show", "abi")
    for group in told.values():
        assert isinstance(group, str) or all(name in out for name in group)


def test_a_replay_that_is_good(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a longer path would be folded in the table
    path = write_trace(Path("good"), small_trace())
    assert document(capsys, "replay", path)["unexpected"] == 0
    code, out, err = result(capsys, "replay", path)
    assert code == GOOD and path in out and not err and "\x1b" not in out


def test_a_replay_that_is_not_says_where(capsys: Capture, tmp_path: Path) -> None:
    """OP-TEE's reserved memory, which a mediator never shows."""
    path = write_trace(tmp_path / "bad", small_trace(Function.GET_SHM_CONFIG, (0, 0x42000000, 0x200000, 1)))
    told = document(capsys, "replay", path, code=FAILED)
    assert told["unexpected"] >= 1 and told["first_unexpected"]["line"] == 3
    code, out, _ = result(capsys, "replay", path)
    assert code == FAILED and f"{path}:3: call 0" in out and "0x42000000" in out


@needs_shared
def test_several_traces_are_summed(capsys: Capture, tmp_path: Path) -> None:
    single = [document(capsys, "replay", str(TRACE), "--policy", "xen")]
    single.append(document(capsys, "replay", write_trace(tmp_path / "t", small_trace()), "--policy", "xen"))
    both = document(capsys, "replay", str(TRACE), str(tmp_path / "t"), "--policy", "xen")
    for name in ("events", "calls", "forwarded", "returned", "unexpected"):
        assert both[name] == single[0][name] + single[1][name]
    assert [each["trace"] for each in both["traces"]] == [str(TRACE), str(tmp_path / "t")]
    assert both["traces"][0] == {"trace": str(TRACE), **single[0]}
    assert both["left"] == single[0]["left"] and both["peak_pages_pinned"] == single[0]["peak_pages_pinned"]


@needs_shared
def test_vectors_agree(capsys: Capture, tmp_path: Path) -> None:
    write_vectors(tmp_path / "few.json", 6)
    told = document(capsys, "conform", "--vectors", str(tmp_path / "few.json"))
    assert told["format"] == "mediator-conform/1" and told["vectors"] == 6 and told["differ"] == []
    code, out, err = result(capsys, "conform", "--vectors", str(tmp_path / "few.json"))
    assert code == GOOD and f"all {told['steps']}" in " ".join(out.split()) and not err and "\x1b" not in out


@needs_shared
def test_a_difference_is_found_and_told(capsys: Capture, tmp_path: Path) -> None:
    data = write_vectors(tmp_path / "few.json", 6)
    vector = next(each for each in data["vectors"] if any(step["op"] == "smc" for step in each["steps"]))
    index, step = next((at, step) for at, step in enumerate(vector["steps"]) if step["op"] == "smc")
    step["out"]["regs"][6] = "0x1234"
    (tmp_path / "changed.json").write_text(json.dumps(data))
    told = document(capsys, "conform", "--vectors", str(tmp_path / "changed.json"), code=FAILED)
    assert [(each["vector"], each["step"], each["field"]) for each in told["differ"]] == [
        (vector["name"], index, "regs")
    ]
    code, out, _ = result(capsys, "conform", "--vectors", str(tmp_path / "changed.json"))
    assert code == FAILED and f"{vector['name']}, step {index} (smc " in out and "0x1234" in out


@needs_shared
@pytest.mark.parametrize("name", ["ours.json", "ours.json.gz"])
def test_what_we_did_is_a_vector_file(capsys: Capture, tmp_path: Path, name: str) -> None:
    given = write_vectors(tmp_path / "few.json", 6)
    observed = tmp_path / name
    document(capsys, "conform", "--vectors", str(tmp_path / "few.json"), "--observed", str(observed))
    data = observed.read_bytes()
    assert (data[:2] == b"\x1f\x8b") == name.endswith(".gz")
    ours = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    assert {key: ours[key] for key in ("format", "ipa_base")} == {key: given[key] for key in ("format", "ipa_base")}
    assert ours["count"] == len(ours["vectors"]) == 6
    again = document(capsys, "conform", "--vectors", str(observed))
    assert again["agree"] == again["steps"] and again["steps"] == sum(len(each["steps"]) for each in given["vectors"])


@needs_shared
def test_observations_that_cannot_be_written(capsys: Capture, tmp_path: Path) -> None:
    write_vectors(tmp_path / "few.json", 1)
    assert "Is a directory" in refused(
        capsys, "conform", "--vectors", str(tmp_path / "few.json"), "--observed", str(tmp_path)
    )


def test_bench_prints_and_ends_well(capsys: Capture) -> None:
    options = ("bench", "--batches", "1", "--calls", "100")
    told = document(capsys, *options)
    code, out, _ = result(capsys, *options, "--filter", "fast")
    assert told["format"] == "mediator-bench/1" and code == GOOD
    assert "us" in out and "target" in out and "x " in out and "REGISTER" not in out


def test_serve_prints_one_document(capsys: Capture) -> None:
    told = document(capsys, "serve", "--guests", "2", "--duration", "0.01", "--workload", "hello", "--check")
    assert told["format"] == "mediator-serve/1" and told["violations"] == 0
    assert [guest["hypervisor"] for guest in told["guests"]] == ["kvm", "xen"]
    assert not any(told["left"].values())


def test_a_board_refuses_the_guest_that_it_is_not_built_for(capsys: Capture) -> None:
    arguments = ["--guests", "3", "--board", "qemu_armv8a", "--in-process", "--workload", "hello", "--duration", "0.01"]
    code, _, err = result(capsys, "serve", *arguments)
    assert code == FAILED
    board, *_, refused_guest = err.splitlines()
    split = "secure RAM is split for 2 guests (CFG_VIRT_GUEST_COUNT), 6.2 MiB of TA RAM each"
    assert board == f"board: {split}"
    assert refused_guest == f"kvm-3: OP-TEE refused the guest: VM_CREATED answered ENOTAVAIL, {split}"
    assert "'pc' is none of" in refused(capsys, "serve", "--board", "pc")


def test_serve_states_its_mission(capsys: Capture) -> None:
    code, out, _ = result(capsys, "serve", "--guests", "1", "--duration", "0.01", "--workload", "hello")
    assert code == GOOD and "\x1b" not in out
    for words in ("kvm-1", "reserved memory", "client ids", "IPA = PA: 0", "left behind: nothing"):
        assert words in out
