"""`tsqp-shm doctor`: what here decides whether a session runs, and how well; a file for each group of checks."""
