"""`mediator serve`: the mediator with simulated guests."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from mediator.cli.options import Json, PolicyName
from mediator.cli.output import BadInput, emit_json, note, show, table, verdict

if TYPE_CHECKING:
    from mediator.service.summary import Summary


class Hypervisor(StrEnum):
    """Flavours that guests can have."""

    KVM = "kvm"
    XEN = "xen"
    MIXED = "mixed"


def serve(
    guests: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="How many VMs.")] = 4,
    hypervisor: Annotated[Hypervisor, typer.Option(help="Their flavour; mixed: in turn.")] = Hypervisor.MIXED,
    policy: PolicyName = "default",
    workload: Annotated[str, typer.Option(metavar="NAME", help="What the guests do.")] = "mixed",
    duration: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="How long; until Ctrl-C if not given.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the invariants at every step.")] = False,
    in_process: Annotated[bool, typer.Option("--in-process", help="Run the guests in this process.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in the models.")] = 0,
    json: Json = False,
) -> int:
    """Run the mediator with simulated guests in front of it and OP-TEE's model behind."""
    if sys.platform != "linux":
        raise BadInput("serve: needs Linux (sealed memfds, SOCK_SEQPACKET, SCM_RIGHTS)")
    import structlog

    from guests.workloads import WORKLOADS
    from mediator.service.options import ServeOptions
    from mediator.service.serve import run_bench

    if workload not in WORKLOADS:
        raise BadInput(f"serve: the workload {workload!r} is none of {', '.join(WORKLOADS)}")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    options = ServeOptions(guests, hypervisor.value, policy, workload, duration, check, json, seed, in_process)
    summary = run_bench(options)
    if json:
        emit_json(summary.as_data())
    else:
        _show(summary)
    return verdict(summary.good)


def _show(summary: "Summary") -> None:
    counts = ("id", "calls", "invokes", "RPCs", "denied", "refused", "rejected", "errors", "pages (peak)")
    guests = table("guest", *counts, "end", right=counts)
    for guest in summary.guests:
        numbers = (guest.vmid, guest.calls, guest.invokes, guest.rpcs, guest.denied, guest.refused, guest.rejected)
        guests.add_row(guest.name, *map(str, numbers), str(guest.errors), str(guest.pages_pinned_peak), guest.ended)
    show(guests, "\n".join(summary.mission()))
    for guest in summary.guests:
        for text in guest.notes:
            note(f"{guest.name}: {text}")
    for violation in summary.violations or ():
        note(violation)
    for name in summary.refused_guests:
        note(f"{name}: OP-TEE refused the guest")
