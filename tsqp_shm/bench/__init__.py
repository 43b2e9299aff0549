"""`tsqp-shm bench`: this system and others on the same model, in turns, in one run."""
