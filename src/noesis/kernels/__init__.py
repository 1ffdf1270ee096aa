"""What runs at every layer: a folder per operation with its reference, backends and registration."""
