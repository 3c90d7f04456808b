"""Comparing the mediator, step by step, with what another one was observed to do."""
