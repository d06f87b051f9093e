"""Features of a frozen encoder: how fast, beside transformers' feature-extraction pipeline and sentence-transformers.

    python benchmarks/features.py [--num_texts 3000] [--layers 4] [--width 256] [--batch_size 32] [--repeats 3]

No network is needed. The texts are keyed: words of made-up frequencies, with lengths whose logarithm is normal, as those of
sentences are. The encoder is a BERT with fresh weights. Every side gives the mean of a text's states, and all are compared before
anything is timed. The pipeline leaves the states of the padding in what it returns, so that side finds the lengths of the texts
too. sentence-transformers takes part where it is installed. The last side reads features that `cache_dir` holds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, pipeline, set_seed

from hf_pretrain import PretrainedFeatures
from hf_pretrain.data import draws
from timing import interleaved, load_of_machine, options_parser, print_table

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 8000
PIPELINE, SENTENCES = "pipeline(feature-extraction)", "SentenceTransformer.encode"
OURS, CACHED = "PretrainedFeatures", "PretrainedFeatures, from its cache"
# Median of the words of a text, and the standard deviation of their logarithm.
MEDIAN, SPREAD, LONGEST = 18, 0.6, 120


def keyed_texts(count: int) -> list[str]:
    """Return texts of mixed lengths in no order of them."""
    keys = draws.row_keys(np.arange(count), seed=0, stream="benchmark features")
    uniforms = draws.uniforms(keys, 2 + LONGEST)
    normal = np.sqrt(-2 * np.log1p(-uniforms[:, 0])) * np.cos(2 * np.pi * uniforms[:, 1])
    lengths = np.clip(np.exp(np.log(MEDIAN) + SPREAD * normal), 1, LONGEST).astype(np.int64)
    words = (uniforms[:, 2:] ** 3 * (VOCABULARY - len(SPECIALS))).astype(np.int64)
    return [" ".join(f"w{word}" for word in row[:length]) for row, length in zip(words.tolist(), lengths, strict=True)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of these texts."""
    names = [*SPECIALS, *(f"w{number}" for number in range(VOCABULARY - len(SPECIALS)))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    known = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **known)


def sides_of(options: argparse.Namespace, texts: list[str], folder: str) -> dict[str, Callable[[], np.ndarray]]:
    """Return the ways to the features, by name."""
    set_seed(0)
    sizes = {"num_hidden_layers": options.layers, "hidden_size": options.width, "intermediate_size": 4 * options.width}
    model = BertModel(BertConfig(vocab_size=VOCABULARY, num_attention_heads=options.width // 64, **sizes)).eval()
    tokenizer = word_tokenizer()
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device=model.device)

    def stock() -> np.ndarray:
        lengths = [len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]
        found = extract(
            texts, batch_size=options.batch_size, return_tensors=True, tokenize_kwargs={"truncation": True}
        )
        return np.stack([states[0, :length].mean(0).numpy() for states, length in zip(found, lengths, strict=True)])

    shared = {"tokenizer": tokenizer, "batch_size": options.batch_size}
    ours = PretrainedFeatures(model, **shared).fit()
    cached = PretrainedFeatures(model, cache_dir=f"{folder}/cache", **shared).fit()
    found: dict[str, Callable[[], np.ndarray]] = {PIPELINE: stock}
    if find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        from hf_pretrain.modeling.pooling import SentenceModules

        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        SentenceModules().write(Path(folder, "model"), hidden_size=options.width, longest=128)
        theirs = SentenceTransformer(f"{folder}/model", device="cpu")
        found[SENTENCES] = lambda: theirs.encode(texts, batch_size=options.batch_size, show_progress_bar=False)
    return found | {OURS: lambda: ours.transform(texts), CACHED: lambda: cached.transform(texts)}


def main() -> None:
    """Compare the features, then the times."""
    numbers = {"num_texts": 3000, "layers": 4, "width": 256, "batch_size": 32, "repeats": 3}
    options = options_parser(__doc__, **numbers).parse_args()
    texts = keyed_texts(options.num_texts)
    words = [len(text.split()) for text in texts]
    print(f"{len(texts)} texts of {min(words)} to {max(words)} words, {np.mean(words):.1f} on average")
    print(f"{torch.get_num_threads()} threads; {load_of_machine()}")
    with tempfile.TemporaryDirectory() as folder:
        sides = sides_of(options, texts, folder)
        features = {name: run() for name, run in sides.items()}
        differences = {name: float(np.abs(found - features[PIPELINE]).max()) for name, found in features.items()}
        assert max(differences.values()) < 1e-5, differences
        seconds = interleaved(sides, options.repeats)
    rows = [
        (
            name,
            seconds[name],
            len(texts) / seconds[name],
            seconds[PIPELINE] / seconds[name],
            f"{differences[name]:.0e}",
        )
        for name in sides
    ]
    print_table(rows, ["Side", "Seconds", "Texts / s", "Times the pipeline", "Largest difference"])


if __name__ == "__main__":
    main()
