"""``python -m smart.demo``."""

from smart.demo import main

if __name__ == "__main__":
    main()
