"""Active and idle time of instances in usage windows, and its price."""
