"""`tsqp-shm inspect`: what a model is, what is followed of it, and the memory that it takes, before it is loaded."""
