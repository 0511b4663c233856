"""The driver's checkpoint calls: worker processes, the `cuda-checkpoint` program, and the meaning of their results."""
