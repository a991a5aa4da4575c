"""Training: devices and workers, optimizer and schedules, checkpoints, what is watched."""
