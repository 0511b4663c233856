"""Whole-system tests with real processes: driver, scheduler, agent and instances, some of which get killed."""
