"""From documents to examples: views of the documents, made anew in each epoch where they are random.

epochs is the contract of all (example ids, epochs, samplers, mixtures). packing makes blocks; pairing and sentence_pairs make
pairs of segments; views makes texts with their partners; bitext makes pairs of translations; lm_modes makes UniLM's attention
modes; windows makes lanes of text for models with a memory; held_out chooses what an evaluation measures.
"""
