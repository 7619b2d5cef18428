"""``python -m smart.evaluate``."""

from smart.evaluate import main

main(prog_name="python -m smart.evaluate")
