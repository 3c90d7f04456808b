"""The contract between the normal world and OP-TEE: identifiers, layouts and codes; data, no behaviour.

Import the modules directly: `smc` (registers), `message` (memory), `rpc` (calls the other way), `results`
(codes), `layout` (every binary layout, declared with construct), `smc_operands` and `rpc_operands` (what each
register and each RPC parameter means).
"""
