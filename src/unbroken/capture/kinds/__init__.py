"""How each kind of object is captured and restored."""
