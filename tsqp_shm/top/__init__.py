"""`tsqp-shm top`: a session's rates and what each side does, seen from outside."""
