"""`python -m dcnseg_cli` is `dcnseg`; torchrun starts it this way."""

from __future__ import annotations

import sys

from dcnseg_cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "dcnseg"  # in messages, and in the command that config.json records
    main()
