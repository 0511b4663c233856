"""What the Linux kernel offers: /proc, cgroups, pidfds, clocks and files."""
