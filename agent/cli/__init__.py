"""The `hibernode` command: one file per command or family of commands, loaded only when it is called.

`main.py` is the entry and lists the commands; `connection.py` finds daemons and calls them; `output.py` is the only
place that writes results. Data goes to stdout, everything else to stderr (STYLE, "CLI").
"""
