"""What both processes did and when: recordings, and the trace that is made of them."""
