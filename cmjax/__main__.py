"""`python -m cmjax` is the `cmjax` command."""

import sys

from cmjax.cli import main

sys.exit(main())
