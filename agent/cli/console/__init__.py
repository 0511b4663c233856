"""Terminal and pipe output: tables, JSON, progress, units, colours."""
