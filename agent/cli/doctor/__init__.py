"""`hibernode doctor`: checks of a host, and the selftest."""
