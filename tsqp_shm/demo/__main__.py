"""`python -m tsqp_shm.demo` prints the demo model's folder, fetched and converted when it is not cached."""

import sys

from tsqp_shm.demo.model import main

sys.exit(main())
