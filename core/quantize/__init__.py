"""Makes quantized checkpoints: one decoder layer at a time, from calibration text to shards on disk."""
