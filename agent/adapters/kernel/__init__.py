"""What the Linux kernel offers: cgroups, processes, memory limits, the clock."""
