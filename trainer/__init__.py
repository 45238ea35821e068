"""One training run: config, engine, loop, checkpoints, exports."""
