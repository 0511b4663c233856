"""The driver's checkpoint calls: worker processes, the cuda-checkpoint program, what their answers mean."""
