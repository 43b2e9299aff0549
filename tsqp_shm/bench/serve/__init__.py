"""`tsqp-shm bench serve`: this package's server beside other engines' own, asked by many clients at once."""
