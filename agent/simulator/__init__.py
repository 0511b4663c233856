"""Replays traffic through the very same decisions as production, on a simulated clock: what would idle mode save?"""
