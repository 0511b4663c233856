"""The only place that touches operating system, driver, container engine and disk."""
