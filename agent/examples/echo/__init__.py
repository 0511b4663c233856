"""The lightest instance there is: standard library only, with device memory if it is asked for."""
