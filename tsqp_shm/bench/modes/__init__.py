"""`tsqp-shm bench modes`: what each mode costs, measured side by side here and worked out for machines elsewhere."""
