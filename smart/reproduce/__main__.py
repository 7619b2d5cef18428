"""``python -m smart.reproduce``."""

from smart.reproduce.command import main

if __name__ == "__main__":
    main()
