"""The warm parent of guest processes: it has imported what a guest needs, and forks one for each request.

    python -m guests.process_parent FD

FD is a socket of type SOCK_SEQPACKET. The first record brings a memfd with the TA images (JSON: base64 by UUID). Each
further record is JSON with the fields of `guests.process.Settings` and brings the guest's link and the socket for its
reports; it is answered by a record with the guest's process id and a pidfd, or with the reason why there is none. It
never runs an event loop itself, so that what it forks starts clean. When the socket is closed it waits for the guests
that still run, and ends.
"""

import base64
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Final
from uuid import UUID

from guests.process import Settings, run

MAX_REQUEST: Final = 4096
"""Bytes of a request."""
MAX_ANSWER: Final = 200
"""Bytes of an answer."""


def main(fd: int) -> None:
    """Serve requests until the socket is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # as whoever started it has done
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(fileno=fd) as control, suppress(ConnectionError):  # the mediator was killed
        images = _receive_images(control)
        while images is not None:
            record, fds, _, _ = socket.recv_fds(control, MAX_REQUEST, 2)
            if not record:
                break
            _make_guest(control, record, fds, images)
    _wait_for_guests()


def _make_guest(control: socket.socket, record: bytes, fds: list[int], images: Mapping[UUID, bytes]) -> None:
    """Fork a guest, and answer."""
    try:
        child = os.fork()
        if not child:
            control.close()
            _be_guest(record, fds, images)
        pidfd = os.pidfd_open(child)
    except OSError as error:  # too many processes, or this one has ended already
        control.send(str(error.strerror).encode()[:MAX_ANSWER])
        return
    finally:
        for each in fds:
            os.close(each)
    socket.send_fds(control, [str(child).encode()], [pidfd])
    os.close(pidfd)


def _receive_images(control: socket.socket) -> Mapping[UUID, bytes] | None:
    """None if the other end is gone before it has sent them."""
    _, fds, _, _ = socket.recv_fds(control, MAX_REQUEST, 1)
    if not fds:
        return None
    with os.fdopen(fds[0], "rb") as file:
        file.seek(0)
        return {UUID(name): base64.b64decode(image) for name, image in json.load(file).items()}


def _be_guest(record: bytes, fds: list[int], images: Mapping[UUID, bytes]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    link, reports = (socket.socket(fileno=fd) for fd in fds)
    status = 1
    try:
        run(Settings(**json.loads(record)), link, reports, images)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is to be unwound


def _wait_for_guests() -> None:
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
