"""Reads the fc3 component's s.yaml of Serverless Devs."""
