"""Device enumeration pseudo TA: which TAs a driver of the normal world should know."""

from __future__ import annotations

from uuid import UUID

from optee.abi.results import TaFlag
from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, PseudoTa, command


class DeviceEnumeration(PseudoTa):
    """Answers the UUIDs, 16 octets each, of the TAs with the flag that the command stands for."""

    uuid = UUID("7011a688-ddde-4053-a5a9-7b3c4ddf13b8")

    @command(0, ParamKind.MEMREF_OUTPUT)
    def get_devices(self, tee: Tee, uuids: Memref) -> None:
        """Devices that work without tee-supplicant."""
        self._answer(tee, uuids, TaFlag.DEVICE_ENUM)

    @command(1, ParamKind.MEMREF_OUTPUT)
    def get_devices_supplicant(self, tee: Tee, uuids: Memref) -> None:
        """Devices that need tee-supplicant."""
        self._answer(tee, uuids, TaFlag.DEVICE_ENUM_SUPP)

    @command(2, ParamKind.MEMREF_OUTPUT)
    def get_devices_storage(self, tee: Tee, uuids: Memref) -> None:
        """Devices that need TEE_STORAGE_PRIVATE."""
        self._answer(tee, uuids, TaFlag.DEVICE_ENUM_TEE_STORAGE_PRIVATE)

    def _answer(self, tee: Tee, uuids: Memref, flag: TaFlag) -> None:
        listed = b"".join(ta.uuid.bytes for ta in tee.known_tas() if ta.flags & flag)
        uuids.put(listed)
