"""`tsqp-shm serve`: OpenAI's HTTP API in front of a session, in the TEE process."""
