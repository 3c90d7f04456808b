"""A user-space TEE mediator: it stands between the VMs of a host and their one OP-TEE."""

__version__ = "0.1.0"
