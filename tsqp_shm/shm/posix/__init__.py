"""The transport of two processes of one user on one system: POSIX shared memory, a locked name, ZeroMQ to wake."""
