"""How many instances a function has, where they are placed, and when that changes."""
