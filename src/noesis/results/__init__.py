"""Every answer on the host."""
