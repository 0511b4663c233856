"""What the daemons use of their host and of each other: state directory, tokens, systemd, the scheduler link."""
