"""Example programs that users could deploy. They import nothing of the agent, only each other."""
