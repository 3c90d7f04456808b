"""A memory manager between objects and RPCs: what was read or written stays in the core's heap, in levels.

None of it exists in OP-TEE, which keeps nothing of a closed file and no block of an open one.
"""
