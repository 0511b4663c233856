"""Active and idle time of instances, in windows, and what it costs."""
