"""What torch does to an op: differentiation and the bookkeeping of mutation."""
