"""Other trainers with exact resume: each adapter imports its own host library, and no other."""
