"""``smart naturalness``: train an ear (``naturalness``, ``naturalness_mel``) on MIDI files of your own, or test one."""
