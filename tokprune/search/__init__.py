"""Searches for the schedule that costs least, or loses least: over schedules and a score, whatever gives that score."""
