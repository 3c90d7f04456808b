"""Each expectation notices that something is otherwise, and says what it looked at."""

import pytest

from tests.scenarios.test_run import play

RAW = """\
machine: {guests: {vm: {driver: none}, other: {hypervisor: xen, driver: none}}}
steps:
- guest: other
  pages: 1
- guest: vm
  sequence:
  - {pages: 2, as: buffer}
  - {write: $buffer, content: {text: abc}}
  - {list: $buffer}
  - {message: REGISTER_SHM, params: [{attr: TMEM_OUTPUT | NONCONTIG, buf_ptr: $list, size: 2 pages, shm_ref: 7}]}
  - {smc: CALL_WITH_ARG, a1:a2: $message, a7: 9, expect: {<call>}}
  - {expect: {<state>}}
"""

CALL = [
    ("a0: OK, a4: 0, a7: 9, message: {ret: SUCCESS, cmd: REGISTER_SHM}", None),
    ("a0: EBUSY", "a0"),
    ("a7: 1", "a7"),
    ("a1:a2: 5", "a1:a2"),
    ("message: {ret: GENERIC}", "message.ret"),
    ("message: {ret_origin: TEE}", "message.ret_origin"),
    ("message: {cmd: CANCEL}", "message.cmd"),
    ("message: {num_params: 2}", "message.num_params"),
    ("message: {session: 1}", "message.session"),
    ("message: {params: [{size: 1}]}", "message.params[0].b"),
    ("message: {params: [{attr: TMEM_INPUT}]}", "message.params[0].attr"),
    ("forwarded: [{a0: CALL_WITH_ARG, a7: $guest.client_id, message: {ret: GENERIC}, lists: [$buffer]}]", None),
    ("forwarded: []", "SMCs to OP-TEE"),
    ("forwarded: [{a0: CALLS_UID}]", "forwarded[0].a0"),
    ("forwarded: [{a0: CALL_WITH_ARG, a7: 9}]", "forwarded[0].a7"),
    ("forwarded: [{a0: CALL_WITH_ARG, message: {cmd: CANCEL}}]", "forwarded[0].message.cmd"),
    ("forwarded: [{a0: CALL_WITH_ARG, argument: {ret: SUCCESS}}]", "forwarded[0].argument"),
    ("forwarded: [{a0: CALL_WITH_ARG, lists: [$list]}]", "forwarded[0].lists[0]"),
]
STATE = [
    ("memory: [{at: $buffer, content: {text: abc}}], ledger: {pages: 2, buffers: 1}, alive: true", None),
    ("memory: [{at: $buffer + 1, content: {text: bd}}]", "byte 1"),
    ("message: {at: $message, ret: GENERIC}", "message.ret"),
    ("maps_to: [{at: $buffer, cookie: 7}]", None),
    ("maps_to: [{at: $buffer, cookie: 8}]", "buffer 0x8 at OP-TEE"),
    ("maps_to: [{at: $buffer, pages: 1, cookie: 7}]", "buffer 0x7 at OP-TEE"),
    ("maps_to: [{at: $buffer, guest: other}]", "IPA 0x4"),
    ("pins: [{at: $buffer, count: 1}, {at: $list, count: 0}]", None),
    ("pins: [{at: $buffer, count: 0}]", "pins of 0x4"),
    ("pins: [{at: $list, count: {at_least: 1}}]", "pins of 0x4"),
    ("ledger: {pages: 3}", "ledger pages"),
    ("ledger: {pages: {at_least: 1, at_most: 1}}", "ledger pages"),
    ("at_optee: {buffers: 0}", "buffers at OP-TEE"),
    ("at_optee: {threads: 1}", "threads at OP-TEE"),
    ("statistics: {forwarded: 0}", "forwarded"),
    ("statistics: {calls: {at_least: 2}}", "calls"),
    ("events: {call_denied: 1}", "event call_denied"),
    ("traffic: {REGISTER_SHM: 1, CANCEL: 0}", None),
    ("traffic: {REGISTER_SHM: 2}", "traffic REGISTER_SHM"),
    ("alive: false", "vm"),
    ("memory: [{at: $buffer - 4096 * 9999, content: {text: abc}}]", "this step"),
    ("ledger: {pages: $nothing.here}", "this step"),
]


@pytest.mark.parametrize(("expected", "what"), CALL)
def test_what_a_call_does(expected: str, what: str | None) -> None:
    _check(RAW.replace("<call>", expected).replace("<state>", ""), what)


@pytest.mark.parametrize(("expected", "what"), STATE)
def test_the_state_of_things(expected: str, what: str | None) -> None:
    body = RAW.replace("<call>", "").replace("<state>", expected)
    _check(body.replace("$nothing.here", "$buffer.nothing"), what)


CLIENT = [
    ("invoke: COUNT, params: [{value: 3}], expect: {params: [{value: 3}]}", None),
    ("invoke: COUNT, params: [{value: 3}], expect: {params: [{value: 4}]}", "params[0].a"),
    ("invoke: COUNT, params: [{value: 3}], expect: {params: [{value: [3, 1]}]}", "params[0].b"),
    ("invoke: COUNT, params: [{value: 3}], expect: {params: [{size: 1}]}", "params[0]"),
    ("invoke: COUNT, params: [{value: 3}], expect: {result: GENERIC}", "result"),
    ("invoke: FAIL, params: [{value: 0xffff0007, direction: input}]", "result"),
    ("invoke: FAIL, params: [{value: 0xffff0007, direction: input}], expect: {result: BAD_STATE}", None),
    (
        "invoke: FAIL, params: [{value: 0xffff0007, direction: input}], expect: {result: BAD_STATE, origin: TEE}",
        "origin",
    ),
    ("invoke: WAIT, params: [{value: 50, direction: input}], expect: {took: 50}", None),
    ("invoke: WAIT, params: [{value: 50, direction: input}], expect: {took: {at_most: 49}}", "took"),
    (
        "invoke: COPY, params: [{temporary: {text: abc}, direction: input}, {temporary: 9, direction: output}], "
        "expect: {params: [null, {content: {text: abc}, size: 3}]}",
        None,
    ),
    (
        "invoke: COPY, params: [{temporary: {text: abc}, direction: input}, {temporary: 9, direction: output}], "
        "expect: {params: [null, {content: {text: abd}}]}",
        "params[1], byte 2",
    ),
    (
        "invoke: COPY, params: [{temporary: {text: abc}, direction: input}, {temporary: 9, direction: output}], "
        "expect: {params: [null, {size: 4}]}",
        "params[1].size",
    ),
    ("read: $memory, content: {text: xyz}", None),
    ("read: $memory, content: {text: xyy}", "byte 2"),
    ("expect: {dirty: [{at: $memory, dirty: false}]}", None),
    ("expect: {dirty: [{at: $memory}]}", "page 0x4"),
    ("expect: {statistics: {smcs: 0}}", "smcs"),
    ("invoke: INC_VALUE, params: [{value: 1}]", "this step"),
    ("close: $memory", "this step"),
]


@pytest.mark.parametrize(("step", "what"), CLIENT)
def test_what_a_client_sees(step: str, what: str | None) -> None:
    body = "steps:\n- {open: exercise}\n- {allocate: 1 page, content: {text: xyz}}\n- {dirty_logging: start}\n"
    _check(f"{body}- {{{step}}}\n", what)


def _check(body: str, what: str | None) -> None:
    outcome = play(body)
    if what is None:
        assert outcome.good, outcome.as_data()
    else:
        assert outcome.failure is not None and what in outcome.failure.what, outcome.as_data()
