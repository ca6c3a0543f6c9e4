"""The loop in which nothing can be forgotten, and what it is given."""
