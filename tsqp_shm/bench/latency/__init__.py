"""What one hand-over between the two processes costs: `tsqp-shm bench latency` and `tsqp-shm bench waits`."""
