"""The emulated NVIDIA driver: replaces libcuda, NVML and cuda-checkpoint, found through LD_LIBRARY_PATH and PATH.

`server.run` runs the driver process, `env.exports` gives the environment of its programs, `control.EmulatedDriver`
inspects it from tests and benchmarks. README.md lists what is emulated and what is not.
"""
