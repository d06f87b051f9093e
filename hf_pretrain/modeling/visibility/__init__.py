"""Which token sees which in a row.

`rules.py` turns a rule, written from compact integers, into the mask that a backbone takes, and tries the backbone out. Rows that
may be padded, and rows whose documents do not see each other, are rules there. In `lm_modes.py` a row is read in one of UniLM's
four modes. In `pairs.py` an encoder-decoder reads several pairs a row, through the hooks of `sides.py`, once `pair_trials.py` has
tried it out. Electric's towers and the two streams of permutation language modelling write their rules beside their models.
"""
