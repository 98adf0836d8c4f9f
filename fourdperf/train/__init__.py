"""Losses, schedules and Lightning modules, one file per model."""
