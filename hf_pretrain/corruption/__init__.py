"""Masking in NumPy: which tokens are selected as targets, and what replaces them.

arguments -> rows (a batch as arrays) -> selection, spans (units to select) -> masking (targets and replacements);
permutation and word_order are the corruptions of XLNet and StructBERT.
"""
