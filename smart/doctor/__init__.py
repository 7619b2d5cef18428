"""``smart doctor``: can this machine run a configuration, and does its GPU compute what a CPU does?"""
