"""A page of this machine that shows runs while they write: curves, pieces to listen to, completions, configuration.

smart watch runs
"""
