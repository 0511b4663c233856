"""What a daemon needs of its surroundings: state directory, tokens, systemd, the link to the scheduler."""
