"""Algorithms on plain arrays: significance, k-means, alignment, sampling."""
