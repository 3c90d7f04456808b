"""Secure storage: GlobalPlatform trusted storage with OP-TEE's formats on the normal world's disk."""
