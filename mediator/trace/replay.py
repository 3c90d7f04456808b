"""Replay a recording: the guest's side goes into the mediator, a scripted secure world answers as recorded.

One VM has the recorded RAM, so that recorded addresses are its IPAs; no frame has PA = IPA. What OP-TEE sees
and what the guest sees are compared with the recording. Source: the trace-file description, "Replaying".
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from hv_models.machine import FIRST_GUEST_PA, MEDIATOR_BASE, Machine, RamBlock
from hv_models.memory import PAGE_SIZE
from hv_models.pages import Page
from mediator.core.mediator import Lifecycle, Mediator
from mediator.core.policy import Policy
from mediator.core.ports import SharedPage
from mediator.core.records import Call
from mediator.core.steps import Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.invariants import Checker, Violation, pins_by_frame
from mediator.trace.format import (
    AnswerEvent,
    CallEvent,
    ForwardEvent,
    Header,
    Mark,
    Memory,
    ReturnEvent,
    TraceEvent,
    read_trace,
)
