"""Compare what we did with what was recorded, and report: agree, differ, or differ as a rule demands."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from mediator.conformance import vectors as v
from mediator.conformance.differences import differences, gfns, hexes
from mediator.conformance.facts import Facts
from mediator.conformance.intended import Declaration, Difference, declarations
from mediator.conformance.run import Observed, Run
from mediator.core.policy import Policy
from mediator.invariants import Violation
from optee.abi.smc import Function

_STATE: Final = frozenset(
    {"pins", "state.call_count", "state.quota_pages", "state.quota_bufs", "state.rpc_bufs", "state.shm_bufs"}
)
_YIELDING: Final = (Function.CALL_WITH_ARG, Function.RETURN_FROM_RPC)


@dataclass(slots=True)
class Report:
    """What a comparison found; the counts are of steps."""

    vectors: int = 0
    steps: int = 0
    agree: int = 0
    intended: Counter[str] = field(default_factory=Counter)
    not_compared: int = 0
    differ: list[dict[str, Any]] = field(default_factory=list)
    violations: list[tuple[str, Violation]] = field(default_factory=list)
    observed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing differs but as declared, and no invariant is violated."""
        return not self.differ and not self.violations

    def as_data(self) -> dict[str, Any]:
        """The JSON document of `mediator conform --vectors`."""
        return {
            "format": "mediator-conform/1",
            "vectors": self.vectors,
            "steps": self.steps,
            "agree": self.agree,
            "intended": dict(sorted(self.intended.items())),
            "not_compared": self.not_compared,
            "differ": self.differ,
            "violations": [{"vector": name, **violation.as_data()} for name, violation in self.violations],
        }


@dataclass(slots=True)
class _Extra:
    """What the recorded mediator still holds of a domain and ours, by a rule, does not."""

    rule: str
    cookies: frozenset[int]
    buffers: int
    pages: int
    pins: Counter[str]


class _Comparison:
    """One vector."""

    def __init__(self, vector: v.Vector, policy: Policy, kinds: list[Declaration], report: Report) -> None:
        self.vector = vector
        self.play = Run(vector, policy)
        self.kinds = kinds
        self.report = report
        self.extras: dict[int, list[_Extra]] = {}
        self.diverged: set[int] = set()
        self.relinquished: dict[int, list[list[str]]] = {}
        self.mislooked: set[int] = set()
        """Domains of which ours may have looked up more or less pages than the recorded mediator since flips were
        asked for."""

    def run(self, *, observe: bool) -> None:
        run = self.play
        observed: list[dict[str, Any]] = []
        try:
            for index, (recorded, ours) in enumerate(zip(self.vector.steps, run.steps(), strict=True)):
                if self._step(index, recorded, ours):
                    run.adopt()
                if observe:
                    observed.append(ours.step.model_dump(mode="json", exclude_none=True))
            run.checker.finish(memory=True)
            self.report.violations.extend((self.vector.name, found) for found in run.checker.violations)
        finally:
            run.close()
        if observe:
            self.report.observed.append({**self.vector.model_dump(mode="json", exclude={"steps"}), "steps": observed})

    def _step(self, index: int, recorded: v.Step, ours: Observed) -> bool:
        """Compare a step; whether everything that differs is declared, or not to be compared."""
        report = self.report
        report.steps += 1
        if isinstance(recorded, v.AllocFault):
            self.play.miscounted = False  # both count from here on
        found = list(differences(recorded, ours))
        if isinstance(recorded, v.Relinquish) and isinstance(ours.step, v.Relinquish):
            found = list(self._relinquish(index, recorded, ours.step))
        domain: int | None = getattr(recorded, "domain", None)
        elsewhere = domain is not None and self._may_be_elsewhere(domain, recorded, ours)
        astray = bool(found) or domain in self.diverged or domain in self.extras
        rules: list[str] = []
        if found and domain is not None and self.extras.get(domain):
            found, rules = self._without_extras(domain, recorded, ours, found)
            elsewhere |= domain in self.diverged
        left = []
        kinds: list[Declaration] = []
        for difference in found:
            kind = next((kind for kind in self.kinds if kind.covers(recorded.op, ours.facts, difference)), None)
            if kind is None:
                left.append(difference)
            else:
                kinds.append(kind)
        rules = [kind.rule for kind in kinds] + rules
        if domain is not None:
            if kinds:
                self._remember(kinds, domain, recorded, ours, found)
            if astray or ours.facts.rejected or ours.facts.page_refused:
                self._lose_count(domain, ours.facts)
        if left and domain is not None and elsewhere and all(_follows(difference, ours.facts) for difference in left):
            self.diverged.add(domain)
            report.not_compared += 1
        elif left:
            for difference in left:
                report.differ.append(
                    {
                        "vector": self.vector.name,
                        "step": index,
                        "field": difference.field,
                        "expected": difference.expected,
                        "got": difference.got,
                    }
                )
            return False
        elif rules:
            report.intended[rules[0]] += 1
        else:
            report.agree += 1
        return True

    def _may_be_elsewhere(self, domain: int, recorded: v.Step, ours: Observed) -> bool:
        """Whether this domain's may be another story by now.

        What the recorded mediator still holds made it refuse; or a failure or a flip that was asked for came at
        another moment.
        """
        if domain in self.diverged or domain in self.mislooked:
            return True
        if self.extras.get(domain) and _refused_there(recorded, ours):
            return True
        early = ours.facts.still_failing and ours.facts.rejected  # before the allocation that would have failed
        return (self.play.miscounted or early) and _failed_once(recorded, ours)

    def _lose_count(self, domain: int, facts: Facts) -> None:
        """In a step that went otherwise, or ended early, the two may have allocated or looked up other things."""
        self.play.miscounted |= facts.failing
        if facts.flipping:
            self.mislooked.add(domain)

    def _remember(
        self, kinds: list[Declaration], domain: int, recorded: v.Step, ours: Observed, found: list[Difference]
    ) -> None:
        """Note what is different from now on: what the recorded mediator keeps, or everything about this domain."""
        if any(kind.holds == "another story" for kind in kinds):
            self.diverged.add(domain)
        elif any(difference.field in _STATE for difference in found):
            rule = next((kind.rule for kind in kinds if kind.holds == "leftovers"), None)
            if rule is None or not self._keep(rule, domain, recorded, ours):
                self.diverged.add(domain)

    def _keep(self, rule: str, domain: int, recorded: v.Step, ours: Observed) -> bool:
        """What the recorded mediator has more than ours; False if ours has something that it has not."""
        assert isinstance(recorded, v.Smc) and isinstance(ours.step, v.Smc)
        theirs, mine = recorded.out.state, ours.step.out.state
        extras = self.extras.setdefault(domain, [])
        pins = Counter(gfns(recorded.out.pins, domain))
        pins.subtract(gfns(ours.step.out.pins, domain))
        cookies = {buffer.cookie for buffer in theirs.shm_bufs}
        own = {buffer.cookie for buffer in mine.shm_bufs}
        pages, buffers = theirs.quota_pages - mine.quota_pages, theirs.quota_bufs - mine.quota_bufs
        for extra in extras:
            pins.subtract(extra.pins)
            own |= extra.cookies
            pages -= extra.pages
            buffers -= extra.buffers
        others = (theirs.call_count, theirs.rpc_bufs) != (mine.call_count, mine.rpc_bufs)
        if others or own - cookies or pages < 0 or buffers < 0 or min(pins.values(), default=0) < 0:
            return False
        new = cookies - own
        both = [
            {buffer.cookie: buffer.has_page_list for buffer in state.shm_bufs if buffer.cookie not in new}
            for state in (theirs, mine)
        ]
        held = sum(buffer.pages for buffer in theirs.shm_bufs if buffer.cookie in new)
        if held > pages or buffers < len(new):
            return False
        if new:
            extras.append(_Extra(rule, frozenset(new), buffers, held, +pins))
            buffers, pages, pins = 0, pages - held, Counter()
        if buffers or pages or any(pins.values()):
            extras.append(_Extra(rule, frozenset(), buffers, pages, +pins))
        return all(both[0].get(cookie, held) == held for cookie, held in both[1].items())

    def _without_extras(
        self, domain: int, recorded: v.Step, ours: Observed, found: list[Difference]
    ) -> tuple[list[Difference], list[str]]:
        """Take from the record what it holds by a known difference; what is left is new."""
        if not isinstance(recorded, v.Smc) or not isinstance(ours.step, v.Smc):
            return found, []
        state = recorded.out.state
        extras = self.extras[domain]
        before = list(extras)
        held = {buffer.cookie for buffer in state.shm_bufs}
        # Of several buffers one is gone: what of the pins was its is not known.
        if any(0 < len(extra.cookies & held) < len(extra.cookies) for extra in extras):
            self.diverged.add(domain)
        extras[:] = [extra for extra in extras if not extra.cookies or extra.cookies <= held]
        rules = [extra.rule for extra in extras]
        left = []
        for difference in found:
            during = difference.field.endswith("pins_during")
            adjusted = _subtract(before if during else extras, difference.field, difference.expected)
            if adjusted != difference.got:
                left.append(Difference(difference.field, adjusted, difference.got))
        return left, rules

    def _relinquish(self, index: int, recorded: v.Relinquish, ours: v.Relinquish) -> Iterator[Difference]:
        """A run of relinquish steps is compared as a whole: it ends with everything given back."""
        calls = self.relinquished.setdefault(recorded.domain, [])
        calls.extend(hexes(forward.regs) for forward in ours.out.forwarded)
        if recorded.out.rc != 0:
            return
        del self.relinquished[recorded.domain]
        if ours.out.rc != 0:
            yield Difference("rc", 0, ours.out.rc)
        announced = [hexes([Function.VM_DESTROYED, recorded.domain + 1, 0, 0, 0, 0, 0, 0])]
        if recorded.domain not in self._created(index):
            announced = []
        if calls != announced:
            yield Difference("forwarded", announced, calls)
        empty = v.State()
        if ours.out.state != empty:
            yield Difference(
                "state", empty.model_dump(), None if ours.out.state is None else ours.out.state.model_dump()
            )
        pins = ours.out.pins.get(str(recorded.domain), {})
        if pins:
            yield Difference("pins", {}, pins)
        self.extras.pop(recorded.domain, None)
        self.diverged.discard(recorded.domain)

    def _created(self, index: int) -> set[int]:
        """Domains that OP-TEE knew when the run of relinquish steps that ends at `index` began."""
        live: set[int] = set()
        for step in self.vector.steps[:index]:
            if isinstance(step, v.Create) and step.out.rc == 0:
                live.add(step.domain)
            elif isinstance(step, v.Relinquish) and step.out.rc == 0:
                live.discard(step.domain)
        return live


def _refused_there(recorded: v.Step, ours: Observed) -> bool:
    """Whether the recorded mediator answered a call itself that ours forwarded."""
    done = ours.step
    if not isinstance(recorded, v.Smc) or not isinstance(done, v.Smc):
        return False
    return not recorded.out.forwarded and bool(done.out.forwarded)


def _failed_once(recorded: v.Step, ours: Observed) -> bool:
    """Whether an allocation may have failed in one of the two only."""
    done = ours.step
    if not isinstance(recorded, v.Smc) or not isinstance(done, v.Smc):
        return False
    theirs, mine = recorded.out, done.out
    if not theirs.forwarded or not mine.forwarded:
        return True
    return theirs.forwarded[0].resumes == "ALLOC" and theirs.forwarded[0].sym != mine.forwarded[0].sym


def _follows(difference: Difference, facts: Facts) -> bool:
    """Whether a difference can come of what the recorded mediator still holds of a domain.

    Such a thing counts against quotas, occupies a cookie or a thread. It changes neither who handles a call, nor
    any fast call, nor the function and client id of what is forwarded.
    """
    if facts.function not in _YIELDING:
        return difference.field in _STATE or difference.field.endswith(".pins_during")
    if difference.field == "handled":
        return False
    if difference.field.endswith("].regs"):
        expected, got = difference.expected, difference.got
        return bool(len(expected) == len(got) and expected[0] == got[0] and expected[-1] == got[-1])
    return True


def _subtract(extras: list[_Extra], name: str, expected: Any) -> Any:
    if name.endswith(("pins", "pins_during")):
        pins = Counter(expected)
        for extra in extras:
            pins.subtract(extra.pins)
        return {gfn: count for gfn, count in pins.items() if count}
    if name == "state.quota_pages":
        return expected - sum(extra.pages for extra in extras)
    if name == "state.quota_bufs":
        return expected - sum(extra.buffers for extra in extras)
    if name == "state.shm_bufs":
        cookies = {hex(cookie) for extra in extras for cookie in extra.cookies}
        return [buffer for buffer in expected if buffer[0] not in cookies]
    return expected


def compare(
    document: v.Document,
    policy: Policy,
    *,
    observe: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run every vector of a file under a policy."""
    report = Report()
    kinds = declarations()
    for vector in document.vectors:
        progress(vector.name)
        report.vectors += 1
        _Comparison(vector, policy, kinds, report).run(observe=observe)
    return report
