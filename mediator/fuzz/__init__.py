"""Hostile and benign guests and a hostile secure world against the core, at full speed, with all invariants on."""

from mediator.fuzz.engine import FuzzReport, fuzz

__all__ = ["FuzzReport", "fuzz"]
