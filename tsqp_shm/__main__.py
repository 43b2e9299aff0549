"""`python -m tsqp_shm` is `tsqp-shm`."""

import sys

from tsqp_shm.cli import main

sys.exit(main())
