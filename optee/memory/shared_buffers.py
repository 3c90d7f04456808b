"""What registered buffers take of the core's heap, and how many fit.

Source: memory sizing reference, section 4.
"""

from __future__ import annotations

from typing import Final

from optee.errors import TeeError
from optee.memory.heap import HEADER, Heap, block_size, block_sizes
from optee.memory.pool import SIZER
from optee.memory.structures import MAPPING, PAGE_ADDRESS, shared_memory

_SIMULATED: Final = 64


def register_peak(pages: int) -> int:
    """Heap that registering a buffer takes while it happens: the array of addresses, and the object that stays."""
    return block_size(PAGE_ADDRESS * pages) + max(block_size(shared_memory(pages)), list_page())


def list_page() -> int:
    """Heap for one page of a page list while it is mapped."""
    return block_sizes((shared_memory(1), MAPPING))


def largest_buffer(largest_free: int) -> int:
    """Pages of the largest buffer that can be registered where the largest free block holds so many bytes."""
    pages = max(largest_free, 0) // (2 * PAGE_ADDRESS)
    while pages and register_peak(pages) > largest_free + HEADER:
        pages -= 1
    return pages


def count_buffers(heap: Heap, pages: int, most: int = 1 << 20) -> int:
    """Buffers of so many pages that can be registered one after the other, at most `most`. Uses up the heap."""
    for count in range(most):
        try:
            array = heap.allocate(PAGE_ADDRESS * pages, SIZER)
            heap.free_all(heap.allocate_all((shared_memory(1), MAPPING), SIZER))
            heap.allocate(shared_memory(pages), SIZER)
        except TeeError:
            return count
        heap.free(array)
    return most


def total_pages(heap: Heap, pages: int) -> int:
    """Pages that can be shared in buffers of so many pages each. Uses up the heap, which has one free block."""
    if not pages:
        return 0
    # Of a large heap all but the end is alike: each object, and unless the best fit is sought a hole beside it.
    each = block_size(shared_memory(pages)) + (0 if heap.best_fit else block_size(PAGE_ADDRESS * pages))
    alike = max(heap.largest_free // each - _SIMULATED, 0)
    if alike:
        heap.allocate(alike * each - HEADER, SIZER)
    return (alike + count_buffers(heap, pages)) * pages
