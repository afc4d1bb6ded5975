#!/usr/bin/env python3
"""`caco-fast report` from a checkout: python tools/report.py RUN [RUN ...] [key=value ...]"""

from caco_fast.cli import leave
from caco_fast.cli.report import main

if __name__ == "__main__":
    leave(main())
