"""What training means: the resumable loader, determinism, ranks that agree."""
