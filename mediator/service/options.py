"""What `mediator serve` was asked for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of one run.

    duration: seconds of workload, None until it is interrupted; check: look at every step with the invariant
    checker; seed: of everything random in the models; in_process: guests are tasks, not processes of their own.
    external: the socket for VMs of others; control: the socket for `mediator ctl`; host_client: the host's own driver
    is a guest as well. record: the trace to write, one for each guest. secure_world: the
    socket of a secure world in another process. board: the board on which OP-TEE runs; None: one with room for all.
    config: a file that says more about how OP-TEE is built.
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
    external: Path | None = None
    control: Path | None = None
    host_client: bool = False
    record: Path | None = None
    secure_world: Path | None = None
    board: str | None = None
    config: Path | None = None
