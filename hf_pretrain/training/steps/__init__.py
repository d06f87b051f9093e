"""What a Trainer does with a micro-batch, in training and in an evaluation.

`runner` computes one: on which attention backend, timed and counted for the profile. `evaluation` chooses the held-out examples
that an evaluation measures, and makes means of their sums.
"""
