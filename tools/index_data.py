#!/usr/bin/env python3
"""Check a folder of images and write an index to train from; the same as `caco-fast index`."""

import sys

from caco_fast.data import index_main

if __name__ == "__main__":
    sys.exit(index_main())
