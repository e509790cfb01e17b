"""`python -m whalepy` and `torchrun -m whalepy`: the command."""

from whalepy.cli import main

if __name__ == "__main__":
    main()
