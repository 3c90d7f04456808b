"""What `mediator serve` was asked for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of one run.

    duration: seconds of workload, None until it is interrupted; check: look at every step with the invariant
    checker; seed: of everything random in the models; in_process: guests are tasks, not processes of their own.
    """

    guests: int = 4
    hypervisor: str = "mixed"
    policy: str = "default"
    workload: str = "mixed"
    duration: float | None = None
    check: bool = False
    json: bool = False
    seed: int = 0
    in_process: bool = True
