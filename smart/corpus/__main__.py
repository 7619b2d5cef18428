"""``python -m smart.corpus``."""

from smart.corpus.command import main

if __name__ == "__main__":
    main()
