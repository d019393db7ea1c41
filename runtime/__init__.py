"""Running jobs on a device: queue, model cache, estimates, uploads."""
