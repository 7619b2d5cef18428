"""``python -m smart.evaluate COMMAND`` is ``smart evaluate COMMAND``."""

from smart.evaluate import main

if __name__ == "__main__":
    main(prog_name="smart evaluate")
