"""Do the objectives of encoders learn? Each on real text, against what can be had without a model.

    python benchmarks/encoder_objectives.py --train_file books.txt --data_dir data [--arm nsp sop] [--max_steps 3000]
    python benchmarks/encoder_objectives.py --table

    nsp, sop            masked tokens and pairs of segments, as BERT's and ALBERT's
    structbert          masked tokens, shuffled words, three kinds of pairs
    spanbert            masked spans, each also from its boundaries
    unilm               BERT's objectives, one-way and sequence to sequence in one mixture
    tlm, mlm            sentences in two languages: with their translations beside half of them, and each alone (one batch of
                        two hundred is of pairs, with weight 0, so that both arms have the same tokenizer and the same held-out
                        sentences and pairs). data_dir holds multi30k/train.en.gz and train.de.gz

Held-out documents. Of each loss, two baselines that know nothing of the context: the unigram of the training text (one added to
each count) at the same targets, and the frequencies of the classes of pairs. Of shuffled words, also how often the token that is
seen is the right one. Each run is a row of the file `results`; what is there is not run again.
"""

import gzip
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import set_seed

from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.multilingual import MultilingualDataArguments
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.encoder import METHOD as encoder
from hf_pretrain.objectives.encoder import EncoderTrainer, EncoderTrainingArguments, load_examples
from hf_pretrain.options import option
from results import ComparisonArguments, compare_arms, read_results, sizes_of
from timing import print_table

ARMS: dict[str, dict[str, Any]] = {
    "nsp": {"objectives": ["mlm", "nsp"]},
    "sop": {"objectives": ["mlm", "sop"]},
    "structbert": {"objectives": ["mlm", "sentence_structure", "word_order"]},
    "spanbert": {
        "objectives": ["mlm", "span_boundary"],
        "masking_unit": "span",
        "replacement_unit": "unit",
    },
    "unilm": {
        "objectives": ["mlm", "nsp", "sequence_to_sequence", "left_to_right", "right_to_left"],
        "objective_shares": "nsp:1/3, sequence_to_sequence:1/3, left_to_right:1/6, right_to_left:1/6",
        "masking_unit": "ngram",
        "ngram_unit": "token",
        "ngram_shares": [0.8, 0.1, 0.1],
    },
    "tlm": {"objectives": ["mlm", "tlm"]},
    "mlm": {"objectives": ["mlm", "tlm"], "tlm_weight": 0.0},
}
# Arms of two languages, with the share of translations among their examples.
_BILINGUAL = {"tlm": 0.5, "mlm": 0.005}


@dataclass
class ObjectiveArguments(ComparisonArguments):
    """What is run."""

    arms: ClassVar = tuple(ARMS)
    arms_without_text: ClassVar = tuple(_BILINGUAL)

    results: str = option("encoder_objectives.json", "File that each run adds a row to.")
    seed: list[int] = option(factory=lambda: [0], help="Seeds; each arm runs with each.")
    model_type: str = option("modernbert", "Architecture.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(4, "Layers.")
    block_size: int = option(128, "Most tokens in an example.")
    max_corpus_bytes: int | None = option(24_000_000, "Train on a random part of the text.")
    max_steps: int = option(3000, "Steps.")
    batch_size: int = option(32, "Examples a step.")


def data_arguments(arm: str, args: ObjectiveArguments) -> MultilingualDataArguments:
    """Return the options of an arm's text."""
    common: dict[str, Any] = {"block_size": args.block_size, "vocab_size": args.vocab_size}
    if arm not in _BILINGUAL:
        return MultilingualDataArguments(
            train_file=args.train_file,
            validation_file=args.validation_file or None,
            document_separator=args.document_separator,
            max_corpus_bytes=args.max_corpus_bytes,
            block_mode="doc_sentences",
            validation_fraction=0.04,
            **common,
        )
    common |= {"document_separator": "line", "validation_fraction": 0.04, "lowercase": True}
    paths = {language: str(sentences_of(args, language)) for language in ("en", "de")}
    languages = [f"{language}={path}" for language, path in paths.items()]
    pairs = [f"en-de={paths['en']},{paths['de']}"]
    return MultilingualDataArguments(
        language_file=languages, parallel_file=pairs, bitext_share=_BILINGUAL[arm], **common
    )


def sentences_of(args: ObjectiveArguments, language: str) -> Path:
    """Unpack the sentences of a language, and return the file."""
    source = Path(args.data_dir, "multi30k", f"train.{language}.gz")
    if not source.is_file():
        raise InputError(f"data_dir={args.data_dir} has no multi30k/train.{language}.gz")
    path = Path(args.results).with_name(f"multi30k.{language}")
    if not path.exists():
        path.write_bytes(gzip.decompress(source.read_bytes()))
    return path


def build(arm: str, seed: int, args: ObjectiveArguments) -> tuple[EncoderTrainer, PreparedData]:
    """Put an arm together."""
    sizes = ModelArguments(
        model_type=args.model_type,
        max_position_embeddings=args.block_size,
        **sizes_of(args.hidden_size, args.num_hidden_layers),
    )
    further = {"max_steps": args.max_steps, **ARMS[arm]}
    options = EncoderTrainingArguments(**args.training(args.runs_folder() / f"{arm}-{seed}", seed, **further))
    data = load_examples(data_arguments(arm, args), sizes, options)
    set_seed(seed)
    return encoder.build_trainer(data, sizes, options), data


def held_out_batches(trainer: EncoderTrainer) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of the evaluation."""
    yield from trainer.get_eval_dataloader()


def baselines(trainer: EncoderTrainer, data: PreparedData) -> dict[str, float]:
    """Return the unigram's loss at each loss's targets, the entropy of the classes of pairs, and how often copying is right."""
    counts = np.ones(len(data.tokenizer))
    store = TokenStore(data.train_documents)
    for start in range(0, store.num_tokens, 1 << 20):
        ids, _ = store.read(start, min(start + (1 << 20), store.num_tokens))
        counts += np.bincount(ids, minlength=len(counts))
    nats = -np.log(counts / counts.sum())
    found: dict[str, list[np.ndarray]] = {}
    copied, pairs = [], []
    for batch in held_out_batches(trainer):
        labels = batch["labels"].numpy()
        is_bitext = batch["is_bitext"].numpy() if "is_bitext" in batch else np.zeros(len(labels), dtype=bool)
        for name, rows in (("mlm", ~is_bitext), ("tlm", is_bitext)):
            found.setdefault(name, []).append(labels[rows][labels[rows] != IGNORED])
        for name, entry in (("word_order", "order_labels"), ("span_boundary", "span_labels")):
            if entry in batch:
                found.setdefault(name, []).append(batch[entry][batch[entry] != IGNORED].numpy())
        if "order_positions" in batch:
            seen = batch["input_ids"].flatten()[batch["order_positions"]]
            copied.append((seen == batch["order_labels"]).numpy())
        if "pair_labels" in batch:
            pairs.append(batch["pair_labels"][batch["pair_labels"] != IGNORED].numpy())
    result = {name: float(nats[np.concatenate(ids)].mean()) for name, ids in found.items() if sum(map(len, ids))}
    if copied:
        result["word_order_copied"] = float(np.concatenate(copied).mean())
    if pairs:
        shares = np.bincount(np.concatenate(pairs)) / sum(map(len, pairs))
        result |= {"pair": float(-(shares * np.log(shares)).sum()), "pair_prior": float(shares.max())}
    return result


def run_arm(arm: str, seed: int, args: ObjectiveArguments) -> dict[str, Any]:
    """Run an arm, and return what was measured."""
    trainer, data = build(arm, seed, args)
    begin = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - begin)
    measured = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    kept = {name: value for name, value in measured.items() if name.endswith(("_loss", "_accuracy", "_nll"))}
    return {"seconds": seconds, "measured": kept, "baselines": baselines(trainer, data)}


def print_results(path: Path) -> None:
    """Print one row a loss of each run."""
    rows = []
    for run in read_results(path):
        known, measured = run["baselines"], run["measured"]
        for name in (key.removesuffix("_loss") for key in measured if key.endswith("_loss")):
            accuracy = measured.get(f"{name}_accuracy")
            trivial = {"pair": known.get("pair_prior"), "word_order": known.get("word_order_copied")}.get(name)
            rows.append(
                [
                    run["arm"],
                    name,
                    f"{measured[f'{name}_loss']:.3f}",
                    f"{known[name]:.3f}" if name in known else "",
                    "" if accuracy is None else f"{100 * accuracy:.1f}",
                    "" if trivial is None else f"{100 * trivial:.1f}",
                    str(run["settings"]["max_steps"]),
                    str(run["seconds"]),
                ]
            )
    columns = ["arm", "loss of", "loss", "baseline", "accuracy", "baseline", "steps", "seconds"]
    print_table(rows, columns)


if __name__ == "__main__":
    compare_arms(ObjectiveArguments, description=__doc__, run_arm=run_arm, results=print_results)
