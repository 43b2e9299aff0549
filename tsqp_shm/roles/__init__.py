"""Processes that play a role: a parent's end, a child's end, the supervisor of both, and what a role needs to begin."""
