"""All built-in TAs."""

from __future__ import annotations

from optee.tas.devices import DeviceEnumeration
from optee.tas.hello_world import HelloWorld
from optee.trusted_application import TrustedApplication

BUILT_IN: tuple[type[TrustedApplication], ...] = (DeviceEnumeration, HelloWorld)
