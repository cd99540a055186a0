"""`python -m mscs` is the `mscs` command."""

import sys

from mscs.cli import main

sys.exit(main())
