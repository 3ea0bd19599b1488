#!@LIB@/bin/python3 -I
"""The program as `make install` puts it on the PATH. -I: nothing in the environment says what is imported."""

import sys

from conntrackd.cli.main import main

sys.exit(main())
