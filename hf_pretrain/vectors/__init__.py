"""Static vectors: one vector a word, learned from counts or by prediction, and sparse vectors of texts.

corpus (words as ids on disk) -> cooccurrence (pairs in windows) -> weighting (PMI, SVD) or GloVe; corpus -> word2vec.
A stock encoder -> distillation. Each makes plain arrays, one row a word; folder writes them with their words as one folder
that AutoModel, sentence-transformers and model2vec open, formats reads and writes others' files, and transfer puts the
vectors into the table of an encoder. text_vectors stands alone: one-hot, counts, TF-IDF and LSA of texts.
"""
