"""Code lengths of vectors."""

from .op import SHORTEST, Book, Coded, code, code_reference, directions

__all__ = ["SHORTEST", "Book", "Coded", "code", "code_reference", "directions"]
