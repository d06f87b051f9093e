import numpy as np, torch
from hf_pretrain.data import draws
from hf_pretrain.models.elmo.softmax_elmo import Negatives


def draw_negatives(size, *, vocab_size, seed, epoch, number):
    if size >= vocab_size:
        return Negatives(torch.arange(vocab_size), torch.tensor(torch.inf))
    key = draws.row_keys([number], seed=seed, epoch=epoch, stream="elmo_negatives")
    length = 4 * size
    while True:
        found = np.exp(draws.uniforms(key, length)[0] * np.log(vocab_size + 1)).astype(np.int64) - 1
        _, firsts = np.unique(found, return_index=True)
        if len(firsts) >= size:
            firsts = np.sort(firsts)[:size]
            return Negatives(torch.from_numpy(found[firsts]), torch.tensor(float(firsts[-1] + 1)))
        length *= 2
