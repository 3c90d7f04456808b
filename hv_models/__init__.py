"""What a hypervisor is: physical memory, stage-2 tables, virtual machines of two flavours, and the conduit.

Import the modules directly: `from hv_models.machine import Machine`.
"""
