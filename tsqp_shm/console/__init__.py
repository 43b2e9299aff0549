"""What a person sees of a session, and types into it."""
