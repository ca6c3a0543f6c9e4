"""`python -m unbroken` is the command `unbroken`."""

from __future__ import annotations

import sys

from unbroken.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
