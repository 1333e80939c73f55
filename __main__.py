"""`python -m uhr_bat VERB ...` is `uhr-bat VERB ...`."""

import sys

from .cli import main

sys.exit(main())
