"""Reading and writing the files of v0.1, the predecessor of this noesis.

Three kinds: a trace with one file per step, a trace in a single file, and a soulprint. This module turns them into
plain data and back; what a trace or a soulprint can do lives with `Trace` and `Soulprint`.

v0.1 recorded one row per *call*, under the module's bare name. So a module called three times in a step has three
rows of one name, and the soulprint's `layer_index` keeps only the last of them: it has fewer names than rows. The
number of rows is `len(soulprint) / 2`, and calls are told apart here as `name#1`, `name#2`, ...
"""

from .fields import SOULPRINT, TRACE, looks_like, trace_files
from .soulprints import Print, print_of, read_soulprint, write_soulprint
from .traces import STATS, Run, StepsReader, read_run, read_runs, read_steps, run_of, runs_in, write_run

__all__ = [
    "SOULPRINT",
    "STATS",
    "TRACE",
    "Print",
    "Run",
    "StepsReader",
    "looks_like",
    "print_of",
    "read_run",
    "read_runs",
    "read_soulprint",
    "read_steps",
    "run_of",
    "runs_in",
    "trace_files",
    "write_run",
    "write_soulprint",
]
