"""The node's SQLite database: instance records and the usage ledger."""
