"""A page to listen to: pairs of pieces by two models for the same prompts and seeds, in one self-contained HTML file.

python -m smart.demo --runs runs/quickstart@base runs/quickstart --out page.html
"""
