"""Schedules of a pipeline as data: which stage does what on which microbatch, in which order, and what it sends."""
