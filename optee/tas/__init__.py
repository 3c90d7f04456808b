"""Trusted applications and pseudo TAs that the model has built in."""
