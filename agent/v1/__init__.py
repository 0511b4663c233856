"""Generated from protos/agent/v1 by scripts/gen-protos; never edited by hand."""
