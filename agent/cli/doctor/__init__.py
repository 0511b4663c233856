"""`hibernode doctor`."""
