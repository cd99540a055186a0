"""`python -m reproduce` is the command line of the pipeline."""

import sys

from reproduce.cli import main

sys.exit(main())
