"""Limits of guests, given at birth and changed while they run (rules R21, R22)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mediator.core.ledger import Limits
from mediator.core.policy import Policy, PolicyLimits
from mediator.core.steps import LIMITS_CHANGED, POOL_CHANGED, Event
from optee.abi.smc import HYPERVISOR_CLIENT_ID, VmId

if TYPE_CHECKING:
    from mediator.core.mediator import Mediator


def bounds(limits: PolicyLimits, threads: int) -> Limits:
    """What limits mean where OP-TEE has so many threads for each guest."""
    return Limits(
        pages=limits.pages,
        buffers=limits.buffers,
        rpc_arguments=2 * threads if limits.rpc_arguments is None else limits.rpc_arguments,
        calls=threads if limits.calls is None else min(limits.calls, threads),
        memory=limits.memory,
        pages_per_buffer=limits.pages_per_buffer,
        reserved_pages=limits.reserved_pages,
    )


def change(core: "Mediator", limits: Mapping[VmId, PolicyLimits], pool_pages: int | None) -> tuple[Event, ...]:
    """See `Mediator.change_limits`."""
    guests = {guest: limits[vm] for vm, guest in core.guests.items() if vm in limits}
    before = {guest: guest.ledger.limits for guest in guests}
    size = core.pool.capacity
    core.pool.change(pool_pages, {guest.ledger: bounds(wanted, core.threads) for guest, wanted in guests.items()})
    events = []
    if pool_pages != size:
        events.append(Event(POOL_CHANGED, "info", HYPERVISOR_CLIENT_ID, {"pages": [size, pool_pages]}))
    for guest, wanted in guests.items():
        guest.limits = wanted
        old, new = before[guest], guest.ledger.limits
        changed = {
            name: [getattr(old, name), getattr(new, name)]
            for name in Limits.__slots__
            if getattr(old, name) != getattr(new, name)
        }
        if changed:
            events.append(Event(LIMITS_CHANGED, "info", guest.vm, changed))
    return tuple(events)


def check_same(old: Policy, new: Policy) -> None:
    """Raise ValueError where a policy differs in more than can change while guests run."""
    fixed = replace(new, limits=old.limits, guests=old.guests, pool_pages=old.pool_pages)
    if new.flow is not None and old.flow is not None:  # turned on or off only at the start
        fixed = replace(fixed, flow=old.flow)
    names = [name for name in Policy.__slots__ if getattr(fixed, name) != getattr(old, name)]
    if names:
        raise ValueError(f"policy {new.name}: {', '.join(names)} cannot change while guests run")
