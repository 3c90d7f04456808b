"""What a run of `mediator serve` did, as data and as text."""

from dataclasses import dataclass
from typing import Any, Final

from mediator.service.served import GuestStatus
from optee.panic import PanicReport

GUEST_KEYS: Final = (
    "name", "hypervisor", "vmid", "calls", "invokes", "rpcs", "denied", "refused", "rejected", "errors",
    "pages_pinned_peak", "pages_translated", "forged_ids", "ended",
)  # fmt: skip
"""What the JSON document says of each guest."""
_SUMMED = ("calls", "invokes", "rpcs", "denied", "refused", "rejected", "errors", "pages_pinned_peak")


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole run.

    reserved_offered: guests to which OP-TEE offered reserved shared memory, whatever the mediator then let them see;
    strangers: calls at OP-TEE whose a7 was no guest's and not the hypervisor's; violated: how many invariants were,
    of which `violations` are the first.
    """

    guests: tuple[GuestStatus, ...]
    reserved_offered: int
    strangers: int
    violations: list[str]
    violated: int
    checked: bool
    left: dict[str, int | None]
    """What cannot be known is None: a secure world elsewhere need not say what it holds."""
    ta_invokes: int | None
    panics: int | None
    cancels: int | None
    thread_limits: int
    up_seconds: float
    seconds: float
    refused_guests: tuple[str, ...]
    faults: tuple[str, ...] = ()
    """What else went wrong, a line for each."""
    split: str = ""
    """How the board is split, said where a guest is refused."""
    panic_reports: tuple[PanicReport, ...] = ()
    """The last few TA panics, as OP-TEE printed them."""

    @property
    def good(self) -> bool:
        """No unexpected result, no violation, nothing left, and the mission kept.

        A VM of others that broke the protocol is its own concern.
        """
        return not (
            any(guest.errors or (guest.ended == "failed" and not guest.stranger) for guest in self.guests)
            or self.violated
            or any(self.left.values())
            or self.refused_guests
            or self.faults
            or self.strangers
            or any(guest.reserved_seen or guest.pages_identical for guest in self.guests)
        )

    def totals(self) -> dict[str, int]:
        """Sums over the guests."""
        return {name: sum(getattr(guest, name) for guest in self.guests) for name in _SUMMED}

    def as_data(self) -> dict[str, Any]:
        """The JSON document of `mediator serve`."""
        return {
            "format": "mediator-serve/1",
            "guests": [guest.as_data(*GUEST_KEYS) for guest in self.guests],
            "totals": {
                **self.totals(),
                "panics": self.panics,
                "cancels": self.cancels,
                "thread_limits": self.thread_limits,
            },
            "mission": {
                "reserved_memory_offered_by_optee": self.reserved_offered,
                "reserved_memory_seen_by_guests": sum(bool(guest.reserved_seen) for guest in self.guests),
                "forged_client_ids_tried": sum(guest.forged_ids for guest in self.guests),
                "foreign_client_ids_at_optee": self.strangers,
                "pages_translated": sum(guest.pages_translated for guest in self.guests),
                "pages_with_pa_equal_to_ipa": sum(guest.pages_identical for guest in self.guests),
                "quota_refusals": sum(guest.quota_refusals for guest in self.guests),
            },
            "ta_invokes": self.ta_invokes,
            "violations": self.violated,
            "left": self.left,
            "panic_reports": [report.to_json() for report in self.panic_reports],
            "up_seconds": round(self.up_seconds, 3),
            "seconds": round(self.seconds, 3),
        }

    def mission(self) -> list[str]:
        """The mission in words, with this run's numbers."""
        data = self.as_data()["mission"]
        count = len(self.guests)
        hidden = data["reserved_memory_offered_by_optee"] - data["reserved_memory_seen_by_guests"]
        looked = "" if self.checked else " (the cheap invariants; --check looks at all)"
        return [
            f"reserved memory: offered by OP-TEE to {data['reserved_memory_offered_by_optee']} of {count} guests, "
            f"hidden from {hidden}",
            f"client ids: {data['forged_client_ids_tried']} forged ones tried, "
            f"{data['foreign_client_ids_at_optee']} reached OP-TEE",
            f"pages translated: {data['pages_translated']}, of which IPA = PA: {data['pages_with_pa_equal_to_ipa']}",
            f"quota refusals: {data['quota_refusals']}",
            f"calls denied: {self.totals()['denied']}",
            f"violations: {self.violated}{looked}",
            "left behind: " + (", ".join(f"{value} {name}" for name, value in self.left.items() if value) or "nothing"),
        ]
