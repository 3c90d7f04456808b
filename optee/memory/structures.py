"""What OP-TEE keeps in its core's heap: sizes of its structures in bytes, without the allocator's header.

Source: memory sizing reference, section 4: read from the debug information of a build for AArch64
(vexpress-qemu_armv8a, CFG_NS_VIRTUALIZATION=y). Named as in OP-TEE.
"""

from __future__ import annotations

from typing import Final

FS_HTREE: Final = 240
"""struct tee_fs_htree: an open file of secure storage, its root node included."""
HTREE_NODE: Final = 104
"""struct htree_node: each further node, for each 4 KiB block beyond the first; all stay while the file is open."""
