"""What this teaches: a C++ class for Python, beside an op.

Not everything beside a model is a tensor. 14_pybind11_module.cpp is a byte-pair tokenizer, a C++ class that
pybind11 gives to Python. It includes no header of torch, so `opkit.cpp.load` builds it with PyPI's pybind11
(pip install 'torch-opkit[pybind]') in seconds; what includes torch/extension.h gets torch's own pybind11.
Either way the library is found by its content: a second run compiles nothing.
"""

from pathlib import Path

import torch

import opkit

HERE = Path(__file__).parent
TEXT = (
    "the cat sat on the mat, the rat sat on the cat; that cat sat at that rat; the mat sat that at the cat. "
)


def main() -> None:
    """Build the tokenizer, and turn a text into a tensor and back."""
    module = opkit.cpp.load("bytepairs", HERE / "14_pybind11_module.cpp", extra_cflags=["-O2"])
    merges = module.Merges(TEXT, count=24)
    tokens = torch.tensor(merges.encode(TEXT))
    print(f"{len(TEXT)} bytes are {len(tokens)} tokens of a vocabulary of {256 + len(merges)}")
    assert len(tokens) < len(TEXT) / 2
    assert merges.decode(tokens.tolist()) == TEXT.encode()
    unseen = "never seen: ä"
    assert merges.decode(merges.encode(unseen)) == unseen.encode()

    again = opkit.cpp.load("bytepairs", HERE / "14_pybind11_module.cpp", extra_cflags=["-O2"])
    assert again is module
    try:
        merges.decode([10_000])
    except IndexError as error:
        print(f"an exception of C++ is one of Python: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
