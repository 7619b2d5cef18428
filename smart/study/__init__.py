"""A listening study as web pages: build it, serve it, export and analyse its ratings.

Only ``key.csv`` tells which system made which excerpt; the server reads it and never sends it.
"""
