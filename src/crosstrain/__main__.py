"""`python -m crosstrain`: the command line, for where its script is not on the path."""

import sys

from crosstrain.cli import main

sys.exit(main())
