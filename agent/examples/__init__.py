"""Programs as a user of Hibernode would deploy them: they import nothing of the agent, only one another."""
