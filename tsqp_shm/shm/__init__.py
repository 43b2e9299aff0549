"""The border: what both processes map, and how one tells the other that a slot is ready."""
