"""The version, read by the build and by `noesis.__version__`."""

__version__ = "0.2.0"
