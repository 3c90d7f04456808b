"""What a run reports: the step that failed, hangs, violated invariants, what is left behind."""

import json
from pathlib import Path

import pytest

from mediator.cli import run
from mediator.core.ledger import Charge
from mediator.scenario import Outcome, load_scenario, run_scenario
from optee.secure_world import SecureWorld
from tests.docs.pages import DOCS, blocks
from tests.wrong_mediators import pages_stay_pinned

HEAD = "scenario: x\npurpose: p\n"


def play(body: str, seed: int = 1, guests: int | None = None) -> Outcome:
    return run_scenario(load_scenario(HEAD + body, "f.yaml"), seed, guests)


def test_a_failure_says_step_expected_got_and_what_went_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = DOCS / "how-to" / "write-a-scenario.md"
    first = next(text for language, text in blocks(page) if language == "yaml")
    file = tmp_path / "first.yaml"
    file.write_text(first, encoding="utf-8")
    assert run(["run", str(file)]) == 1
    out = capsys.readouterr().out
    shown = next(text for language, text in blocks(page) if language == "text")
    assert shown.replace("first.yaml", str(file)).strip() in out
    assert "CALL_WITH_REGD_ARG → OK" in out and f"again: mediator run {file} --seed 1" in out
    assert run(["run", str(file), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    failure = document["scenarios"][0]["failure"]
    assert document["format"] == "mediator-run/1" and document["failed"] == 1
    assert failure["at"] == f"{file}:5" and (failure["expected"], failure["got"]) == ("44", "43")


def test_the_scenarios_of_the_documentation_run() -> None:
    pages = (DOCS / "how-to" / "write-a-scenario.md", DOCS / "reference" / "scenario.md")
    texts = [text for page in pages for language, text in blocks(page) if language == "yaml"]
    assert len(texts) == 4
    for text in texts[1:]:
        outcome = run_scenario(load_scenario(text, "page.yaml"))
        assert outcome.good, outcome.as_data()


def test_bursts_are_told_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.yaml"
    body = "machine: {costs: true}\nsteps:\n- {burst: delay, ta: reusing, calls: 20, within: 1 s}\n"
    file.write_text(HEAD + body + "- {burst: bare, ta: reusing, calls: 32}\n", encoding="utf-8")
    assert run(["run", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["scenarios"][0]["bursts"]
    assert [(row["form"], row["calls"], row["answered"], row["within"]) for row in rows] == [
        ("delay", 20, 20, 1.0),
        ("bare", 32, 32, 0.0),
    ]
    assert rows[0]["per_second"] <= 21 < rows[1]["per_second"]
    assert run(["run", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "20 in 1 s" in out and "32 at once" in out and "TA command 50 us" in out


def test_a_burst_that_does_not_end_well_has_its_line() -> None:
    outcome = play("steps:\n- {fail: mediator_page, nth: 40}\n- {burst: bare, ta: reusing, calls: 50}\n")
    assert outcome.failure is not None and outcome.failure.place == "f.yaml:5"
    assert outcome.failure.got == "COMMUNICATION from COMMS"


def test_scenarios_that_begin_with_the_same_words_are_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    for name, group in (("stack", ["stack-canary", "stack-exhaustion", "stack-smash"]), ("fairness", ["fairness"])):
        assert run(["run", name, "--list", "--json"]) == 0
        assert [row["scenario"] for row in json.loads(capsys.readouterr().out)["scenarios"]] == group
    assert run(["run", "stac"]) == 2


def test_memory_of_the_guest_that_is_gone() -> None:
    """The nth access fails, once; none is left out: message, page list, pages, write-back."""
    answers = []
    for nth in range(1, 6):
        outcome = play(
            "machine: {each: {driver: none}}\nsteps:\n- {pages: 1}\n- {list: $pages}\n"
            "- message: REGISTER_SHM\n"
            "  params: [{attr: TMEM_OUTPUT | NONCONTIG, buf_ptr: $list, size: 9, shm_ref: 1}]\n"
            f"- {{fail: guest_memory, nth: {nth}}}\n"
            "- {smc: CALL_WITH_ARG, a1:a2: $message, expect: {a0: OK, message: {ret: SUCCESS}}}\n"
        )
        answers.append(None if outcome.failure is None else outcome.failure.got)
    assert answers == ["EBADADDR", "BAD_PARAMETERS", "BAD_PARAMETERS", "EBADADDR", None]


def test_a_hang_names_who_waits_for_what() -> None:
    outcome = play(
        "timeout: 5\nmachine: {each: {supplicant: silent}, optee: {early_tas: []}}\nsteps:\n- {open: hello_world}\n"
    )
    assert outcome.failure is not None
    assert outcome.failure.expected == "an end within 5 s of virtual time"
    assert outcome.failure.got == "still waiting: f.yaml:6: open: hello_world of kvm-1"
    assert (outcome.failure.place, outcome.failure.step) == ("f.yaml:6", "open: hello_world")
    assert outcome.failure.guest == "kvm-1" and outcome.events


@pytest.mark.parametrize(
    ("body", "headline"),
    [
        ("timeout: 0\nsteps:\n- {open: hello_world}\n", ":3: timeout: the scenario"),
        ("steps:\n- {advance: 2 h}\n", ":4: advance: 7200.0 (kvm-1): the scenario"),
        ("machine: {guests: {a: , b: }}\nsteps:\n- {advance: 2 h}\n", ":5: advance: 7200.0: the scenario"),
    ],
)
def test_a_hang_has_its_line_in_the_headline(
    body: str, headline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(HEAD + body, encoding="utf-8")
    assert run(["run", str(file)]) == 1
    assert f"\n{file}{headline}\n" in capsys.readouterr().out


def test_a_sweep_reports_the_first_seed_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two counters race; which one is first is the seed's to say."""
    file = tmp_path / "race.yaml"
    file.write_text(
        "scenario: race\npurpose: A race.\nsteps:\n"
        "- {open: single_instance, as: one}\n- {open: single_instance, as: two}\n"
        "- parallel:\n  - {invoke: COUNT, session: $one, params: [{value: 1}], expect: {params: [{value: 1}]}}\n"
        "  - {invoke: COUNT, session: $two, params: [{value: 1}]}\n",
        encoding="utf-8",
    )
    assert run(["run", str(file), "--seeds", "50", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["scenarios"]
    assert found["failure"]["got"] == "2" and found["seeds"] == found["seed"]
    assert run(["run", str(file), "--seed", str(found["seed"]), "--json"]) == 1
    (again,) = json.loads(capsys.readouterr().out)["scenarios"]
    assert again["failure"] == found["failure"]
    if found["seed"] > 1:
        assert run(["run", str(file), "--seeds", str(found["seed"] - 1)]) == 0


def test_the_number_of_guests_is_a_parameter() -> None:
    body = (
        "machine: {guests: 2, each: {hypervisor: mixed}}\nsteps:\n"
        "- {guest: every, open: hello_world}\n- {guest: every, invoke: INC_VALUE, params: [{value: $guest.number}]}\n"
    )
    assert play(body).guests == 2
    outcome = play(body, guests=5)
    assert outcome.good and outcome.guests == 5


def test_a_guest_that_dies_ends_its_branch_and_nothing_is_left() -> None:
    outcome = play(
        "machine: {guests: {a: , b: {hypervisor: xen}}}\nsteps:\n"
        "- {guest: every, open: exercise}\n"
        "- parallel:\n"
        "  - guest: a\n    sequence:\n"
        "    - {invoke: WAIT, params: [{value: 10000, direction: input}]}\n"
        "    - {expect: {alive: false}}\n"
        "  - sequence: [{advance: 1}, {kill: a}]\n"
        "- {guest: a, expect: {alive: false}}\n"
        "- {guest: b, invoke: COUNT, params: [{value: 1}]}\n"
        "- {create: a}\n- {guest: a, open: exercise}\n"
    )
    assert outcome.good, outcome.as_data()
    assert outcome.seconds < 5


@pytest.mark.parametrize(
    ("steps", "place"),
    [
        ("- {kill: a, at_call: 1}\n- {guest: a, open: exercise}\n- {guest: b, open: exercise}\n", "f.yaml:6"),
        ("- {kill: a}\n- {guest: a, open: exercise}\n", "f.yaml:6"),
    ],
)
def test_a_death_ends_the_scenario_only_where_nothing_was_to_come(steps: str, place: str) -> None:
    outcome = play("machine: {guests: {a: , b: }}\nsteps:\n" + steps)
    assert outcome.failure is not None and (outcome.failure.place, outcome.failure.guest) == (place, "a")
    assert play(
        "machine: {guests: {a: , b: }}\nsteps:\n" + "- {kill: a, at_call: 1}\n- {guest: a, open: exercise}\n"
    ).good


def test_a_machine_that_cannot_be_has_its_line() -> None:
    for machine, words in (
        ("{optee: {guests: 1}, guests: {a: , b: }}", "no room for b"),
        ("{optee: {secure_ram: 4 KiB}, guests: {a: }}", "no room for a"),
    ):
        outcome = play(f"machine: {machine}\nsteps:\n- {{guest: every, open: exercise}}\n")
        assert outcome.failure is not None and outcome.failure.place == "f.yaml:3" and words in outcome.failure.got


def test_what_a_scripted_secure_world_breaks_is_noticed() -> None:
    """OP-TEE names a thread that is already suspended: the guest is isolated."""
    outcome = play(
        "machine: {each: {driver: none, vcpus: 2}}\nsteps:\n"
        "- {message: CLOSE_SESSION}\n"
        "- {secure_world: [{a0: FOREIGN_INTR, a3: 1}, {a0: FOREIGN_INTR, a3: 1}]}\n"
        "- {smc: CALL_WITH_ARG, a1:a2: $message, expect: {a0: FOREIGN_INTR, a3: 1}}\n"
        "- {message: CLOSE_SESSION}\n"
        "- {smc: CALL_WITH_ARG, a1:a2: $message, expect: {a0: UNKNOWN_FUNCTION, events: {guest_isolated: 1}}}\n"
    )
    assert outcome.good, outcome.as_data()


def test_a_failure_in_one_branch_ends_the_others_whatever_their_kernel_waits_for() -> None:
    outcome = play(
        "steps:\n- {open: exercise, as: one}\n- {open: exercise, as: two}\n- parallel:\n"
        "  - {invoke: WAIT, session: $one, params: [{value: 1000000, direction: input}]}\n"
        "  - {close: $one}\n"
        "  - {invoke: FAIL, session: $two, params: [{value: 0xffff0007, direction: input}]}\n"
    )
    assert outcome.failure is not None and outcome.failure.got == "BAD_STATE from TRUSTED_APP"
    assert outcome.seconds == 0


WRITE = (
    "{invoke: WRITE_RAW, params: [{temporary: {text: a}, direction: input}, {temporary: {text: b}, direction: input}]}"
)
READ = "{invoke: READ_RAW, params: [{temporary: {text: a}, direction: input}, {temporary: 9, direction: output}]%s}"


def test_a_power_cut_in_the_middle_of_steps_leaves_the_disk_and_boots_again() -> None:
    body = "steps:\n- {open: secure_storage}\n- %s\n- {cut_power: [%s], at_call: %d}\n%s- %s\n"
    found = READ % ", expect: {params: [null, {content: {text: b}}]}"
    again = "- {open: secure_storage}\n"
    assert play(body % (WRITE, READ % "", 3, again, found)).good
    assert not play(body % (WRITE, READ % "", 3, "", found)).good, "the old session is gone"
    assert play(body % (WRITE, READ % "", 1000, "", found)).good, "fewer SMCs than that: nothing was cut"


def test_files_of_another_time_or_guest_are_served() -> None:
    missing = READ % ", expect: {result: ITEM_NOT_FOUND}"
    steps = f"steps:\n- {{open: secure_storage}}\n- {missing}\n- {{save_files: before}}\n- {WRITE}\n"
    steps += "- {serve_files: before}\n"
    assert play(f"{steps}- {missing}\n").good
    for wrong in ("{serve_files: nobody}", '{serve_files: before, files: ["7"]}'):
        outcome = play(f"{steps}- {wrong}\n")
        assert outcome.failure is not None and outcome.failure.place == "f.yaml:9"


def test_one_of_several_contents() -> None:
    body = "steps:\n- {open: secure_storage}\n- %s\n- %s\n"
    either = READ % ", expect: {params: [null, {one_of: [{text: x}, {text: %s}]}]}"
    assert play(body % (WRITE, either % "b")).good
    outcome = play(body % (WRITE, either % "c"))
    assert outcome.failure is not None and outcome.failure.expected == "one of 2 contents"


@pytest.mark.parametrize("step", ["{close: $session}", "{cancel: $session}", "{invoke: 0}"])
def test_a_session_ends_with_its_kernel(step: str) -> None:
    outcome = play(
        "steps:\n- {open: hello_world}\n- {cut_power: [{open: hello_world, as: other}], at_call: 1}\n- " + step + "\n"
    )
    assert outcome.failure is not None and "$session ended with the kernel that opened it" in str(outcome.failure)


def test_a_guest_is_created_once() -> None:
    outcome = play("machine: {guests: {vm: {created: false}}}\nsteps:\n- sequence: [{create: vm}, {create: vm}]\n")
    assert outcome.failure is not None and "alive already" in outcome.failure.got


def test_what_a_script_says_wrongly_is_told_at_its_step() -> None:
    outcome = play(
        "machine: {each: {driver: none}}\nsteps:\n- {message: CLOSE_SESSION}\n- {let: {words: {text: a}}}\n"
        "- {secure_world: [{a0: OK, a1: $words}]}\n- {smc: CALL_WITH_ARG, a1:a2: $message}\n"
    )
    assert outcome.failure is not None and outcome.failure.place == "f.yaml:7"
    assert outcome.failure.got == "$words is 1 bytes, where a number is wanted"


def test_a_bug_of_ours_ends_the_run_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(SecureWorld, "_yielding", broken)
    with pytest.raises(BaseExceptionGroup) as raised:
        play("steps:\n- parallel: [{open: hello_world}, {open: exercise}]\n")
    assert raised.group_contains(RuntimeError, match="a bug")


def test_a_violated_invariant_fails_the_step_after_which_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Charge, "refund", lambda _: None)
    body = "steps:\n- {pages: 1}\n- {list: $pages}\n- {smc: GET_OS_REVISION}\n- {message: CLOSE_SESSION}\n"
    outcome = play("machine: {each: {driver: none}}\n" + body + "- {smc: CALL_WITH_ARG, a1:a2: $message}\n")
    assert outcome.failure is not None and outcome.failure.place == "f.yaml:9"
    assert outcome.failure.what == "invariant 2" and outcome.violations


def test_pins_that_are_never_taken_back_are_violations_and_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages_stay_pinned(monkeypatch)
    assert run(["run", "hello"]) == 1
    out, err = capsys.readouterr()
    assert "invariant 1" in out and err == ""


def test_others_have_their_turn_while_op_tee_takes_its_time() -> None:
    """The guest dies while its call is with OP-TEE: its end waits for the answer, and nothing is left."""
    outcome = play(
        "machine: {each: {driver: none}, guests: {slow: , other: }}\n"
        "steps:\n"
        "- {guest: slow, message: CLOSE_SESSION}\n"
        "- {guest: slow, secure_world: [{a0: OK, takes: 5}]}\n"
        "- parallel:\n"
        "  - {guest: slow, smc: CALL_WITH_ARG, a1:a2: $message}\n"
        "  - sequence:\n"
        "    - {advance: 1}\n"
        "    - {guest: slow, expect: {ledger: {calls: 1}}}\n"
        "    - {guest: other, smc: GET_OS_REVISION, expect: {a0: 4}}\n"
        "    - {kill: slow}\n"
    )
    assert outcome.good, outcome.as_data()
    assert outcome.seconds == 5.0


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{stage2: 0, pages: 999999999, becomes: none}", "999999999 pages, where kvm-1 has 8192"),
        ("{expect: {pins: [{at: 0, pages: 8193, count: 0}]}}", "8193 pages, where kvm-1 has 8192"),
        ("{stage2: $pages + 8}", "is not where a page begins"),
        ("{stage2: $pages, from: kvm-1, from_at: $pages + 8}", "is not where a page begins"),
    ],
)
def test_a_step_is_about_whole_pages_and_no_more_than_there_are(step: str, words: str) -> None:
    outcome = play(f"steps:\n- {{pages: 1}}\n- {step}\n")
    assert outcome.failure is not None and outcome.failure.place == "f.yaml:5" and words in outcome.failure.got
    assert play("machine: {each: {ram: 8 MiB}}\nsteps:\n- {stage2: $guest.ram, pages: 2048}\n").good


@pytest.mark.parametrize("step", ["repeat: $n", "for_each: x, to: $n"])
def test_turns_that_are_known_late_are_bounded_when_the_step_runs(step: str) -> None:
    outcome = play(f"steps:\n- {{let: {{n: 1000001}}}}\n- {{{step}, do: []}}\n")
    assert outcome.failure is not None and outcome.failure.place == "f.yaml:5"
    assert "1000001 turns, where 0 to 1000000" in outcome.failure.got


@pytest.mark.parametrize("step", ["kill", "destroy", "abandon"])
def test_a_guest_of_which_op_tee_does_not_let_go_stays_until_it_is_ended_again(step: str) -> None:
    body = (
        "machine: {each: {driver: none}, guests: {alice: {vcpus: 1}}, optee: {guests: 4}}\n"
        "steps:\n"
        "- {pages: 1, as: buffer}\n- {list: $buffer}\n"
        "- {message: REGISTER_SHM, params: [{attr: TMEM_OUTPUT | NONCONTIG, buf_ptr: $list, size: 4096, shm_ref: 7}]}\n"
        "- {smc: CALL_WITH_ARG, a1:a2: $message, expect: {a0: OK, message: {ret: SUCCESS}}}\n"
        "- {secure_world: [{to: VM_DESTROYED, a0: EBUSY}]}\n"
        "- {kill: alice}\n"
        "- {expect: {pins: [{at: $buffer, count: 1}]}}\n"
        "- {smc: GET_OS_REVISION, expect: {a0: UNKNOWN_FUNCTION}}\n"
    )
    assert play(body).good  # its end is tried again when the scenario ends
    outcome = play(f"{body}- {{{step}: alice}}\n- {{create: alice}}\n- {{smc: GET_OS_REVISION, expect: {{a0: 4}}}}\n")
    assert outcome.failure is None and not outcome.violations
    assert outcome.left == ({"buffers": 1} if step == "abandon" else {})  # nobody told OP-TEE of that end


def test_only_a_guest_in_quarantine_is_abandoned() -> None:
    outcome = play("machine: {each: {driver: none}}\nsteps:\n- {abandon: kvm-1}\n")
    assert outcome.failure is not None and outcome.failure.got == "one that is not"


def test_a_core_that_breaks_down_after_a_violation_is_told_by_the_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediator.core.sharing.release_argument", lambda world, guest, argument: None)
    monkeypatch.setattr("mediator.core.yielding.release_shared", lambda core, guest, shared: None)
    outcome = play("steps:\n- {open: hello_world}\n- {invoke: INC_VALUE, params: [{value: 1}]}\n- {allocate: 4096}\n")
    assert outcome.violations and outcome.failure is not None and outcome.failure.what.startswith("invariant")
