"""Does denoising help translation? Encoder-decoders of equal training FLOPs, fine-tuned on English to German.

    python benchmarks/seq2seq_quality.py --data_dir data [--arm bart t5] [--seed 0 1] [--flops 8e12]
    python benchmarks/seq2seq_quality.py --table

    bart        the text with its sentences permuted and spans infilled; the target is the text
    t5          spans as sentinels; the target is the spans
    ul2         the seven denoisers of UL2
    prefix_lm   the beginning of the text; the target is the rest
    mass        a text without a fragment; the target is the fragment
    none        no pre-training

All arms are one T5 of one size with one tokenizer, which knows the text and both languages. They are pre-trained by
`hf-pretrain denoise` in one order of the text a seed, for as many steps as the budget pays for: FLOPs of forward and backward are
counted once an arm, on real batches, by torch's FlopCounterMode. Then the stock Seq2SeqTrainer fine-tunes each export on as many
pairs, in one order a seed. Judged are the held-out translations: nats a token, and BLEU (sacrebleu, if it is installed) of the
first sentences, decoded greedily by the stock `generate`.

Beside the loss of the pre-training, in nats a target, stand what counting says at the same held-out targets: the unigram, and the
bigram that knows the token before each target. Both are counted on the targets of the training text. Losses of two arms do not
compare, as their targets differ.

The folder `data_dir` holds multi30k/train.en.gz, train.de.gz and the same of test, and books/train.txt.xz and valid.txt.xz unless
`train_file` and `validation_file` name other text. Each run is a row of the file `results`: what is there is not run again, and
several processes may fill it, each with arms and seeds of its own. The models are kept in a folder beside it.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.references import reference_losses
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.options import option
from hf_pretrain.training.trainer import PretrainingTrainer
from results import (
    Column,
    ComparisonArguments,
    command_line,
    compare_arms,
    flops_of_a_step,
    held_out_file,
    shared_tokenizer,
    sizes_of,
    train_by_program,
    trainer_of_program,
)

ARMS = ("none", "bart", "t5", "ul2", "prefix_lm", "mass")
LANGUAGES = ("en", "de")
MODES = ("[NLU]", "[NLG]", "[S2S]")
# Half of a block, one token a span: as many are never needed.
SENTINELS = 100
_COUNTED_TARGETS = 500_000
# One document in so many is enough for a vocabulary.
_TOKENIZER_STRIDE = 8
# Longer sentences of multi30k are rare; a translation ends there too.
_LONGEST = 64


@dataclass
class TranslationArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("seq2seq_quality.json", "File that each run adds a row to.")
    flops: float = option(8e12, "Training budget of the pre-training.")
    max_corpus_bytes: int | None = option(16_000_000, "Train on a random part of the text.")
    vocab_size: int = option(4096, "Tokens of the tokenizer, trained once on the text and both languages.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(3, "Layers of the encoder, and of the decoder.")
    optimizer: str = option("adamw_rms", "Optimizer of the pre-training.")
    learning_rate: float = option(1e-2, "Peak rate on text, relative to the size of the weights for adamw_rms.")
    held_out_characters: int = option(
        300_000, "Evaluate on the first documents of validation_file, of so many characters."
    )
    tune_steps: int = option(400, "Steps of fine-tuning.")
    tune_batch_size: int = option(32, "Pairs a step of fine-tuning.")
    tune_rate: float = option(2e-3, "Peak rate of fine-tuning, by Adafactor.")
    translations: int = option(300, "Sentences that are translated for BLEU.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        books = Path(self.data_dir, "books")
        if not self.train_file and not self.table:
            self.train_file, self.validation_file = [str(books / "train.txt.xz")], [str(books / "valid.txt.xz")]
        super().__post_init__()


def read_pairs(args: TranslationArguments, split: str) -> list[list[str]]:
    """Return the sentences of a split in each language.

    Raises:
        InputError: If a file is missing.
    """
    sides = []
    for language in LANGUAGES:
        path = Path(args.data_dir, "multi30k", f"{split}.{language}.gz")
        if not path.is_file():
            raise InputError(f"data_dir={args.data_dir} has no multi30k/{path.name}: see --help for what it must hold")
        sides.append(gzip.decompress(path.read_bytes()).decode().splitlines())
    return sides


def tokenizer_of(args: TranslationArguments) -> str:
    """Return the folder of the tokenizer that all arms share."""

    def texts() -> Iterator[str]:
        yield from itertools.chain.from_iterable(read_pairs(args, "train"))
        yield from itertools.islice(read_documents(args.train_file), 0, None, _TOKENIZER_STRIDE)

    tokens = [*(f"<extra_id_{index}>" for index in range(SENTINELS)), *MODES]
    return shared_tokenizer(args, texts, added=tokens)


# Pre-training


def command(arm: str, seed: int, args: TranslationArguments, folder: Path) -> list[str]:
    """Return the arguments of `hf-pretrain denoise` for an arm; the model of `none` is built as that of `bart`."""
    options: dict[str, Any] = {
        "noise": "bart" if arm == "none" else arm,
        "train_file": args.train_file,
        "validation_file": held_out_file(args, args.held_out_characters),
        "max_corpus_bytes": args.max_corpus_bytes,
        "document_separator": args.document_separator,
        "tokenizer_name": tokenizer_of(args),
        "block_size": args.block_size,
        "model_type": "t5",
        # One pass over text needs no dropout.
        "config_overrides": json.dumps({"dropout_rate": 0.0}),
    }
    options |= sizes_of(args.hidden_size, args.num_hidden_layers)
    options |= args.training(folder, seed, optim=args.optimizer, lr_scheduler_type="linear", warmup_steps=0.1)
    return command_line(options)


def pretrain(arm: str, seed: int, args: TranslationArguments, folder: Path) -> dict[str, Any]:
    """Pre-train an arm by the program, or leave it as it is built; its folder has the export."""
    argv = command(arm, seed, args, folder)
    trainer = trainer_of_program("denoise", argv, args)
    if arm == "none":
        trainer.save_model()
        return {"steps": 0, "flops": 0, "seconds": 0}
    step = flops_of_a_step(trainer)
    steps = max(1, round(args.flops / step))
    trained, row = train_by_program("denoise", argv, steps=steps)
    row |= {"steps": steps, "flops": steps * step, "denoising": row["held_out"]["denoising_loss"]}
    return row | counted(trained)


def counted(trainer: PretrainingTrainer) -> dict[str, float]:
    """Return what counting and copying reach at the held-out targets."""
    start = trainer.model.model.config.decoder_start_token_id
    training, held_out_text = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
    return reference_losses(
        _enough(_started(training, start), _COUNTED_TARGETS),
        _started(held_out_text, start),
        vocab_size=len(trainer.processing_class),
    )


def _started(batches: Iterable[dict[str, Any]], start: int) -> Iterator[dict[str, Any]]:
    """Yield batches on the CPU whose targets begin with the model's own token, which the collator leaves open."""
    for batch in batches:
        arrays = {name: value.cpu() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        inputs = arrays["decoder_input_ids"]
        yield arrays | {"decoder_input_ids": inputs.masked_fill(inputs < 0, start)}


def _enough(batches: Iterable[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Yield batches until they have so many targets."""
    seen = 0
    for batch in batches:
        yield batch
        seen += int((batch["labels"] != IGNORED).sum())
        if seen >= most:
            return


# Translation


def tokenized(pairs: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the pairs as examples of the stock collator."""
    sources, targets = ([ids[:_LONGEST] for ids in tokenizer(side)["input_ids"]] for side in pairs)
    return Dataset.from_dict({"input_ids": sources, "labels": targets})


def fine_tune(folder: Path, seed: int, args: TranslationArguments) -> Seq2SeqTrainer:
    """Fine-tune an export on the pairs by the stock Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    options = Seq2SeqTrainingArguments(
        output_dir=str(folder / "translation"),
        max_steps=args.tune_steps,
        per_device_train_batch_size=args.tune_batch_size,
        per_device_eval_batch_size=50,
        learning_rate=args.tune_rate,
        warmup_steps=0.1,
        optim="adafactor",
        train_sampling_strategy="group_by_length",
        prediction_loss_only=True,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    set_seed(seed)
    trainer = Seq2SeqTrainer(
        model,
        options,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=tokenized(read_pairs(args, "train"), tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def translation_nll(trainer: Seq2SeqTrainer, pairs: Sequence[Sequence[str]]) -> float:
    """Return the mean of all tokens of the translations, in nats: each batch counts by its tokens."""
    nats, tokens, model = 0.0, 0, trainer.model.eval()
    for batch in trainer.get_eval_dataloader(tokenized(pairs, trainer.processing_class)):
        count = int((batch["labels"] != IGNORED).sum())
        nats += float(model(**batch).loss) * count
        tokens += count
    return nats / tokens


@torch.no_grad()
def translate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Translate sentences greedily."""
    found: list[str] = []
    for first in range(0, len(texts), 50):
        inputs = tokenizer(texts[first : first + 50], return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = model.generate(**inputs.to(model.device), max_new_tokens=_LONGEST, num_beams=1, do_sample=False)
        found += tokenizer.decode(ids, skip_special_tokens=True)
    return [text.strip() for text in found]


def bleu(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return sacrebleu's BLEU; nothing, with a word, where it is not installed."""
    try:
        sacrebleu = importlib.import_module("sacrebleu")
    except ImportError:
        print("no BLEU: sacrebleu is not installed (pip install 'hf-pretrain[translation]')")
        return {}
    return {"bleu": sacrebleu.corpus_bleu(found, [expected]).score}


def run_arm(arm: str, seed: int, args: TranslationArguments) -> dict[str, Any]:
    """Pre-train an arm, fine-tune it and judge its translations."""
    folder = args.runs_folder() / f"{arm}-{seed}"
    row = pretrain(arm, seed, args, folder)
    begin = time.perf_counter()
    tuner = fine_tune(folder, seed, args)
    row["tune_seconds"] = round(time.perf_counter() - begin)
    test = read_pairs(args, "test")
    row["nll"] = translation_nll(tuner, test)
    sources, expected = (side[: args.translations] for side in test)
    found = translate(tuner.model.eval(), tuner.processing_class, sources)
    row |= bleu(found, expected)
    row["examples"] = list(zip(sources[:3], found[:3], expected[:3], strict=True))
    row["parameters"] = sum(parameter.numel() for parameter in tuner.model.parameters())
    return row | {"threads": torch.get_num_threads()}


COLUMNS = (
    Column("FLOPs", "flops", 1, None),
    Column("steps", "steps"),
    Column("denoising loss", "denoising", 1, 3),
    Column("unigram", "unigram_nll", 1, 3),
    Column("bigram", "bigram_nll", 1, 3),
    Column("translation, nats a token", "nll", 1, 3),
    Column("BLEU", "bleu", 1, 2),
    Column("seconds", "seconds"),
    Column("of fine-tuning", "tune_seconds"),
)


if __name__ == "__main__":
    compare_arms(TranslationArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
