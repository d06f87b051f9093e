"""Skip-gram and CBOW.

`training` reads the corpus and keeps the run; `tables` is what it makes of the counts of words. Two backends learn: `kernel` on
the CPU, compiled by numba, and `batches` in torch.
"""
