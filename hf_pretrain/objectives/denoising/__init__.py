"""Sequence-to-sequence denoising: BART, T5, UL2, prefix language modelling and MASS, on any encoder-decoder."""
