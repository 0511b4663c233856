"""The scheduler's database: engine, tables of functions and nodes, the leader's lock."""
