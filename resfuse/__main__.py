"""`python -m resfuse`."""

import sys

from resfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
