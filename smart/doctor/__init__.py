"""``smart doctor``: check whether this machine can run a configuration, and list how to fix what is missing."""

from smart.doctor.machine import main

__all__ = ["main"]
