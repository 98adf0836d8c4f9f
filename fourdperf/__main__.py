"""``python -m fourdperf``: the command line."""

import sys

from fourdperf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
