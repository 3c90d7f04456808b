"""`mediator serve`: the mediator with simulated guests."""

import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mediator.cli.options import Json, PolicyName
from mediator.cli.output import BadInput, emit_json, note, show, table, verdict

if TYPE_CHECKING:
    from mediator.service.summary import Summary


DEFAULT_GUESTS: Final = 4
"""Two of each flavour."""
_SHOWN_VIOLATIONS: Final = 10


class Hypervisor(StrEnum):
    """Flavours that guests can have."""

    KVM = "kvm"
    XEN = "xen"
    MIXED = "mixed"


def serve(
    guests: Annotated[
        int | None, typer.Option(min=0, max=1000, metavar="N", help="How many VMs; 4, or 0 with --external.")
    ] = None,
    hypervisor: Annotated[Hypervisor, typer.Option(help="Their flavour; mixed: in turn.")] = Hypervisor.MIXED,
    policy: PolicyName = "default",
    workload: Annotated[str, typer.Option(metavar="NAME", help="What the guests do.")] = "mixed",
    duration: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="How long; until Ctrl-C if not given.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the invariants at every step.")] = False,
    in_process: Annotated[bool, typer.Option("--in-process", help="Run the guests in this process.")] = False,
    external: Annotated[bool, typer.Option("--external", help="Let VMs of others come by --socket.")] = False,
    socket: Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="Socket for VMs of others.")] = None,
    control: Annotated[Path | None, typer.Option("--control", metavar="PATH", help="Socket for mediator ctl.")] = None,
    host_client: Annotated[bool, typer.Option("--host-client", help="The host's own driver is a client, too.")] = False,
    secure_world: Annotated[
        Path | None, typer.Option("--secure-world", metavar="PATH", help="Forward to the secure world there.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--record", metavar="FILE", help="Write each guest's trace.")] = None,
    board: Annotated[
        str | None,
        typer.Option("--board", metavar="NAME", help="OP-TEE's board, such as qemu_armv8a; else a roomy one."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="More about how OP-TEE is built: its heap, caches.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in the models.")] = 0,
    json: Json = False,
) -> int:
    """Run the mediator with simulated guests in front of it and OP-TEE's model behind."""
    if sys.platform != "linux":
        raise BadInput("serve: needs Linux (sealed memfds, SOCK_SEQPACKET, SCM_RIGHTS)")
    if duration is not None and not math.isfinite(duration):
        raise BadInput("serve: --duration is a number of seconds")
    if external != (socket is not None):
        raise BadInput("serve: --external and --socket PATH belong together")
    if guests is None:
        guests = 0 if external else DEFAULT_GUESTS
    if not guests and not external:
        raise BadInput("serve: --guests 0 leaves nobody to serve, but for --external")
    _raise_file_limit()
    import structlog

    from guests.workloads import WORKLOADS
    from mediator.service.options import ServeOptions
    from mediator.service.serve import run_bench
    from optee.memory.boards import BOARDS

    if board is not None and board not in BOARDS:
        raise BadInput(f"serve: the board {board!r} is none of {', '.join(BOARDS)}")
    if (board is not None or config is not None) and secure_world is not None:
        raise BadInput(
            "serve: --board and --config build the OP-TEE of this process, --secure-world forwards to another one"
        )
    if workload not in WORKLOADS:
        raise BadInput(f"serve: the workload {workload!r} is none of {', '.join(WORKLOADS)}")
    structlog.configure(logger_factory=lambda: structlog.PrintLogger(sys.stderr))
    options = ServeOptions(
        guests=guests,
        hypervisor=hypervisor.value,
        policy=policy,
        workload=workload,
        duration=duration,
        check=check,
        json=json,
        seed=seed,
        in_process=in_process,
        external=socket,
        control=control,
        host_client=host_client,
        record=record,
        secure_world=secure_world,
        board=board,
        config=config,
    )
    summary = run_bench(options)
    if json:
        emit_json(summary.as_data())
    else:
        _show(summary)
    for violation in summary.violations[:_SHOWN_VIOLATIONS]:
        note(violation)
    if summary.violated > _SHOWN_VIOLATIONS:
        note(f"and {summary.violated - _SHOWN_VIOLATIONS} more violations")
    for fault in summary.faults:
        note(fault)
    return verdict(summary.good)


def _raise_file_limit() -> None:
    """A guest process takes four file descriptors of ours."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _show(summary: "Summary") -> None:
    counts = ("id", "calls", "invokes", "RPCs", "denied", "refused", "rejected", "errors", "pages (peak)")
    guests = table("guest", *counts, "end", right=counts)
    for guest in summary.guests:
        numbers = (guest.vmid, guest.calls, guest.invokes, guest.rpcs, guest.denied, guest.refused, guest.rejected)
        guests.add_row(guest.name, *map(str, numbers), str(guest.errors), str(guest.pages_pinned_peak), guest.ended)
    lines = summary.mission()
    if len({guest.hypervisor for guest in summary.guests}) > 1:
        lines.append("machine: KVM and Xen on one host is a convenience of this bench; --hypervisor kvm or xen exists")
    if summary.panic_reports:
        lines += [f"TA panics: {summary.panics}; the last one on OP-TEE's console:", summary.panic_reports[-1].text()]
    show(guests, "\n".join(lines))
    for guest in summary.guests:
        for text in guest.notes:
            note(f"{guest.name}: {text}")
    for name in summary.refused_guests:
        note(f"{name}: OP-TEE refused the guest{summary.split}")
