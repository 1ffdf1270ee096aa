"""The command line: commands, loading of models, prompts, the demo."""

from .command_line import main

__all__ = ["main"]
