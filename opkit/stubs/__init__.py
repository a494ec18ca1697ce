"""Stubs: what type checkers are to know of ops and modules that Python code reaches by name, at run time.

    scale = opkit.get("fast::scale")                 # a type checker sees an op of any arguments here
    native = opkit.cpp.load("native", "native.cpp")  # and a module of which nothing is known

`write` imports a package, looks what such names stand for, and writes `.pyi` files: each is its module with those
statements replaced by what was found. It changes no source, and writes over nothing but its own files.
"""

from opkit.stubs._package import FILE as FILE
from opkit.stubs._package import MARK as MARK
from opkit.stubs._package import stubs as stubs
from opkit.stubs._package import write as write

__all__ = ["FILE", "MARK", "stubs", "write"]
