#!/usr/bin/env python3
"""`caco-fast train` from a checkout: python tools/train.py --config quickstart [key=value ...]"""

from caco_fast.cli import leave
from caco_fast.cli.train import main

if __name__ == "__main__":
    leave(main())
