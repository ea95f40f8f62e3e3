"""The laboratory: do a few directions carry training, and does learning faster along them help?

Studies compare arms that train one model from the same start on the same batches, each at the best of equally
many learning rates; verdicts are computed from the runs. ``comoving lab list | run | report`` on the command line.
"""
