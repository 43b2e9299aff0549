"""The GPU process: untrusted, the only one that imports torch."""
