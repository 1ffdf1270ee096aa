"""Code lengths of vectors."""

from .op import code
from .reference import SHORTEST, Book, Coded, code_reference, directions

__all__ = ["SHORTEST", "Book", "Coded", "code", "code_reference", "directions"]
