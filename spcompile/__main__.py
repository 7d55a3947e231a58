"""`python -m spcompile`: the command."""

from spcompile.command.cli import main

if __name__ == "__main__":
    main()
