"""OP-TEE: its ABI (`optee.abi`) and a model of the secure world behind it."""
