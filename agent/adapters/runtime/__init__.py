"""What all runtimes share: bundles, exits, log files, the environment of an instance."""
