"""`python -m caco_fast COMMAND ...`, the same as `caco-fast COMMAND ...`."""

from caco_fast.cli import program

# Worker processes import this module too, and must not start the program again.
if __name__ == "__main__":
    program()
