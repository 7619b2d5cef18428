"""``smart doctor``: can this machine run a configuration, and does its GPU compute what a CPU does?"""

from smart.doctor.command import main

__all__ = ["main"]
