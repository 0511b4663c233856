"""The node's SQLite database: records of instances and the ledger."""
