"""Schedules, the Gaussian process, objectives, timestep samplers and samplers: mathematics in torch, no I/O."""
