"""A run's checkpoints: written, checksummed, found whole, and read again under any plan."""
