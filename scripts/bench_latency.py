#!/usr/bin/env python3
"""The latency microbenchmark: a slot and its doorbell beside the same payload through ZeroMQ, as bytes and as msgpack.

    scripts/bench_latency.py [--runs N] [--quick] [--json FILE] ...

`tsqp-shm bench latency` by another name: what is measured stands in `tsqp_shm/bench/latency/cases.py`.
"""

import sys

from tsqp_shm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "latency", *sys.argv[1:]]))
