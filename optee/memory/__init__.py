"""OP-TEE's memory: what each pool holds, who takes it, and what fits."""
