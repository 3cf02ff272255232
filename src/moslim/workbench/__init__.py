"""Embedded world: generated questions and answers whose preference levels can be counted exactly."""
