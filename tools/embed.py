#!/usr/bin/env python3
"""`caco-fast embed` from a checkout: python tools/embed.py runs/quickstart data=DIR out=FILE.npy [key=value ...]"""

from caco_fast.cli import leave
from caco_fast.cli.embed import main

if __name__ == "__main__":
    leave(main())
