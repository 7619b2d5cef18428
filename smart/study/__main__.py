"""``python -m smart.study`` is ``smart study``."""

from smart.study import main

main(prog_name="smart study")
