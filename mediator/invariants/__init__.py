"""The invariants, checked from outside the core after every step.

The checker stands where the shell stands: it makes the requests, sees each step, and counts what the hypervisor
and the secure world hold. Of the core's books it believes nothing that it could not count itself. Source: the list
of eleven invariants in the fault model.
"""

from mediator.invariants.checker import SCAN_EVERY, Checker
from mediator.invariants.host import Host
from mediator.invariants.violations import TITLES, Violation

__all__ = ["SCAN_EVERY", "TITLES", "Checker", "Host", "Violation"]
