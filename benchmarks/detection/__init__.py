"""Out-of-distribution detection: trained models with their sets, known detectors, figures."""
