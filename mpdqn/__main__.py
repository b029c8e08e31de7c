"""``python -m mpdqn``: the `mpdqn` command."""

import sys

from mpdqn.cli import main

sys.exit(main())
