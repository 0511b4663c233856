"""The proof of a GPU host: everything that is promised of it, measured in minutes, as one JSON file and one page."""
