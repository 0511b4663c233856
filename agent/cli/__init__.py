"""The `hibernode` command.

- `main.py`: entry point and list of commands; each command's module is imported when it is called
- `demo/` and `doctor/`: the two large commands; `commands/`: all others
- `fc3/`: reads s.yaml files; `console/`: tables, JSON, progress and units
- `daemon_locator.py` finds daemons, `daemon_calls.py` calls them, `options.py` holds shared options

Data goes to stdout, everything else to stderr; `agent/exit_codes.py` lists the exit codes.
"""
