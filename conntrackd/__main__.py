"""`python -m conntrackd` is `conntrackd`."""

import sys

from conntrackd.cli.main import main

sys.exit(main())
