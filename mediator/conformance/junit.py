"""Verdicts as a JUnit report, which CI servers read."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from mediator.conformance.run_cases import Verdict


def junit(verdicts: Sequence[Verdict], suite: str) -> bytes:
    """Write the report as XML."""
    counts = {
        "tests": len(verdicts),
        "failures": sum(verdict.word == "failed" for verdict in verdicts),
        "skipped": sum(verdict.word == "skipped" for verdict in verdicts),
    }
    root = ElementTree.Element("testsuite", {"name": suite} | {key: str(count) for key, count in counts.items()})
    for verdict in verdicts:
        case = ElementTree.SubElement(root, "testcase", {"name": verdict.case.scenario, "classname": suite})
        if not verdict.passed:
            kind = "skipped" if verdict.word == "skipped" else "failure"
            ElementTree.SubElement(case, kind, {"message": verdict.why})
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"
