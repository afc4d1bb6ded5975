#!/usr/bin/env python3
"""`caco-fast evaluate` from a checkout: python tools/evaluate.py runs/quickstart knn [key=value ...]"""

from caco_fast.cli import leave
from caco_fast.cli.evaluate import main

if __name__ == "__main__":
    leave(main())
