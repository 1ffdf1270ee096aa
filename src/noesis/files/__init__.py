"""Bytes, safetensors, JSON of strangers, log files, files of v0.1: formats, and no results."""

from .atomic import PathLike, read_bytes, write_bytes
from .bounded_json import parsed
from .contents import Contents, read_contents
from .formats import (
    Arrays,
    dump_json,
    is_json,
    load_tensors,
    number_lists,
    pack_tensors,
    parse_json,
    parse_tensors,
    read_header,
    read_json,
    reading_tensors,
    save_json,
    save_tensors,
    unknown_suffix,
)
from .loggers import writer
from .versions import check_header, heading

__all__ = [
    "Arrays",
    "Contents",
    "PathLike",
    "check_header",
    "dump_json",
    "heading",
    "is_json",
    "load_tensors",
    "number_lists",
    "pack_tensors",
    "parse_json",
    "parse_tensors",
    "parsed",
    "read_bytes",
    "read_contents",
    "read_header",
    "read_json",
    "reading_tensors",
    "save_json",
    "save_tensors",
    "unknown_suffix",
    "write_bytes",
    "writer",
]
