"""llama.cpp's own server, by xllamacpp: a script for the Python of a venv that has that and nothing of this package.

Started as `PYTHON llama_server.py JSON`, which has gguf, port, threads, sequences and positions of each.
"""

from __future__ import annotations

import json
import signal
import sys

import xllamacpp  # type: ignore[import-not-found]


def main() -> None:
    settings = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.port = settings["port"]
    params.n_parallel = settings["sequences"]
    params.n_ctx = settings["sequences"] * settings["positions"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    # What goes wrong alone.
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    # Its threads take no signal that this one waits for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
