"""Doors for code written against other libraries. Nothing here acts on import."""
