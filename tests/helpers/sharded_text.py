"""A small text in shards, and streams of it."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_pretrain.data import draws
from hf_pretrain.data.streaming.blocks import StreamingBlocks

NUM_SHARDS, DOCUMENTS_PER_SHARD = 4, 11
VOCAB = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, ".": 4, **{f"w{k}": 5 + k for k in range(400)}}


def make_tokenizer():
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tokenize(texts):
    """Stand in for the document tokenizer: words between spaces, a sentence begins after a full stop."""
    ids = [[VOCAB[word] for word in text.split()] for text in texts]
    return {
        "input_ids": ids,
        "word_starts": [[True] * len(row) for row in ids],
        "sent_starts": [[k == 0 or row[k - 1] == VOCAB["."] for k in range(len(row))] for row in ids],
        "doc_id": list(range(len(ids))),
    }


def read(path):
    """Return the keyed texts of a shard; the last shard is empty but for one empty document."""
    shard = int(path.removeprefix("shard-"))
    if shard == NUM_SHARDS - 1:
        return iter([""])
    keys = draws.row_keys(np.arange(DOCUMENTS_PER_SHARD), seed=shard)
    lengths = 1 + draws.integers(keys, 1, high=40)[:, 0]
    words = draws.integers(keys, 40, high=400)
    ends = draws.uniforms(keys, 40) < 0.2
    return (
        " ".join(f"w{word}" + " ." * bool(end) for word, end in zip(row[:n], stop[:n], strict=True))
        for row, stop, n in zip(words, ends, lengths, strict=True)
    )


PATHS = [f"shard-{k}" for k in range(NUM_SHARDS)]


class Source:
    """A source of shards; a place is the number of documents before it."""

    def __init__(self, paths=PATHS, read=read):
        self.paths = paths
        self.texts = read

    @property
    def num_shards(self):
        return len(self.paths)

    def read(self, shard, *, start=0, epoch=0):
        texts = self.texts(self.paths[shard])
        return ((text, number) for number, text in enumerate(texts, 1) if number > start)

    def identity(self):
        return self.paths


def make_stream(source=None, **options):
    defaults = {"block_size": 16, "documents_per_buffer": 4, "tokenize": tokenize}
    source = Source() if source is None else source
    return StreamingBlocks(source, tokenizer=make_tokenizer(), **{**defaults, **options})


def as_list(examples):
    return examples


def rows(shards):
    for path in shards:
        for text in read(path):
            yield {"body": text or None, "source": path}
