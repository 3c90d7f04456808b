"""`serve --record`: a trace file for each guest."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hv_models.vm import VirtualMachine
from mediator.board import MediatedMachine
from mediator.documents import DocumentError
from mediator.trace.record import Recorder, TraceFile

_UNFIT: Final = re.compile(r"[^A-Za-z0-9._-]")


class Recordings:
    """Trace files of a run, written while it runs; use it with `with`.

    A trace is that of one guest: where there can be more than one, each has its own file, in whose name the guest's
    stands before the suffixes (`calls.jsonl`: `calls.kvm-1.jsonl`). Raises DocumentError where there can be no file.
    """

    def __init__(self, board: MediatedMachine, path: Path, driver: str, *, alone: bool) -> None:
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise DocumentError([f"{path}: no trace can be written there"])
        self._board = board
        self._path = path
        self._driver = driver
        self._alone = alone
        self._open: dict[int, TraceFile] = {}
        self._used: set[Path] = set()
        self.failures: list[str] = []
        """Recordings that ended early, a line for each."""

    def begin(self, vm: VirtualMachine) -> None:
        """Record a VM that OP-TEE knows, from now on."""
        file = TraceFile(self._name(vm))
        self._end(vm.client_id)
        self._open[vm.client_id] = file
        board = self._board
        board.service.recorders[vm.client_id] = Recorder(
            file,
            vm,
            board.core.guests,
            board.world,
            driver=self._driver,
            policy=board.core.policy.name,
            own=board.probed.told,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in list(self._open):
            self._end(client)

    def _end(self, client: int) -> None:
        """Finish the file of a guest; a client id that comes again is another guest."""
        file = self._open.pop(client, None)
        if file is not None:
            file.close()
            if file.failure:
                self.failures.append(file.failure)

    def _name(self, vm: VirtualMachine) -> Path:
        path = self._path
        if not self._alone:
            stem, dot, suffixes = path.name.partition(".")
            name, number = _UNFIT.sub("_", vm.name), 1
            path = path.with_name(f"{stem}.{name}{dot}{suffixes}")
            while path in self._used:
                number += 1
                path = path.with_name(f"{stem}.{name}-{number}{dot}{suffixes}")
        self._used.add(path)
        return path
