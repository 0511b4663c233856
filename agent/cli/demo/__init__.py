"""`hibernode demo`."""
