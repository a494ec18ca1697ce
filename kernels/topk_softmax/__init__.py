"""opkit::topk_softmax: the declaration is in topk_softmax.py, the kernels beside it."""
