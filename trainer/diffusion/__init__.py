"""Schedules, the Gaussian process, objectives, timestep samplers and samplers: pure torch, no I/O."""
