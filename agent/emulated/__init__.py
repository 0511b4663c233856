"""The emulated NVIDIA driver: stand-ins at the driver's own boundary, found through LD_LIBRARY_PATH and PATH.

`driver.run` is the driver process, `env.exports` how programs find it, `control.EmulatedDriver` how tests and
benchmarks look inside. README.md says what is emulated and what is not.
"""
