#!/usr/bin/env python3
"""`caco-fast export` from a checkout: python tools/export.py SOURCE FORMAT OUT [key=value ...]"""

from caco_fast.cli import leave
from caco_fast.cli.export import main

if __name__ == "__main__":
    leave(main())
