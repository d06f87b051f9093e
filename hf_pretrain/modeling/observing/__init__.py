"""Reads a stock model while it runs: hidden states, attentions, predictions at some positions."""
