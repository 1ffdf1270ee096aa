"""The hot path: observed classes, sites, the recorder and its banks, channels, pipelines."""
