"""The TEE process: may see the data. Imports neither torch nor transformers."""
