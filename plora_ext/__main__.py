"""`python -m plora_ext` is `plora-ext`."""

import sys

from plora_ext.cli import main

sys.exit(main())
