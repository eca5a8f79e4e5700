"""`python -m autoflash`: the command line, for where the console script is not on PATH."""

from autoflash.cli import main

if __name__ == "__main__":
    main()
