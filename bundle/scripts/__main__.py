"""`python -m equireg` is the command `equireg`."""

from .cli import main

if __name__ == "__main__":
    main()
