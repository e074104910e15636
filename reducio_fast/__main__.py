"""`python -m reducio_fast` is `reducio-fast`."""

import sys

from .cli import main

sys.exit(main())
