"""What is normal: codebooks, calibration, scores, drift."""
