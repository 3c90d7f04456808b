"""The mediator as a running service: trio around the core, a machine, a secure world, and guests."""
