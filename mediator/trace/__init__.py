"""Traces: what a driver and OP-TEE said to each other, read, replayed, drawn and written."""
