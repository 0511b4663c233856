"""Text for terminals: tables, JSON, progress, units, colours."""
