"""`python -m reducio_fast` is `reducio-fast`."""

import sys

from .cli.main import main

sys.exit(main())
