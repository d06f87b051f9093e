"""The special tokens behind a text are predicted only where its document ends: not where it goes on in another row."""

import itertools

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.method_matrix import QUIET, tiny_tokenizer
from hf_pretrain import CausalLMModelArguments, CausalLMTrainer, CausalLMTrainingArguments, DataCollatorForCausalLM
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.lm_modes import CausalView
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.objectives.encoder import EncoderTrainingArguments
from hf_pretrain.objectives.encoder.collator import DataCollatorForEncoder
from hf_pretrain.objectives.encoder.trainer import EncoderTrainer

FIRST_ID = 5
VOCAB = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "[END]": 3000}
VOCAB |= {f"w{k}": FIRST_ID + k for k in range(2000)}
MODES = ["full_rows", "full_sentences", "doc_sentences", "tokens", "isolated_documents"]
SUFFIXES = {"[CLS] $A [SEP]": (3,), "[CLS] $A [END] [SEP]": (3000, 3)}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}


def tokenizer_of(template, side="right"):
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, VOCAB[name]) for name in ("[CLS]", "[SEP]", "[END]")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side=side, additional_special_tokens=["[END]"], **names
    )


def random_documents(rng):
    """Documents of any length, some of them empty, in sentences and words of any length; no token occurs twice."""
    lengths = rng.integers(0, 60, size=rng.integers(1, 25)) * (rng.random() < 0.9) + 1
    lengths[rng.random(len(lengths)) < 0.1] = 0
    lengths[0] = max(lengths[0], 1)
    ids = np.split(np.arange(FIRST_ID, FIRST_ID + lengths.sum()), np.cumsum(lengths)[:-1])
    words, sentences = ([rng.random(n) < share for n in lengths] for share in (0.6, 0.15))
    for flags in (*words, *sentences):
        flags[:1] = True
    return {"input_ids": [row.tolist() for row in ids], "word_starts": [row.tolist() for row in words],
            "sent_starts": [row.tolist() for row in sentences], "doc_id": list(range(len(ids)))}  # fmt: skip


def blocks_of(columns, tokenizer, *, size, mode, streams):
    if not streams:
        rows = datasets.Dataset.from_dict(columns)
        return list(EpochDataset(BlockDataset(rows, tokenizer=tokenizer, block_size=size, mode=mode)))

    class Source:
        num_shards = 1

        def read(self, shard, *, start=0, epoch=0):
            return ((str(n), n + 1) for n in range(start, len(columns["input_ids"])))

        def identity(self):
            return []

    def tokenize(texts):
        return {name: [values[int(text)] for text in texts] for name, values in columns.items()}

    options = {"documents_per_buffer": 4, "shuffle_buffer_size": 3, "seed": size}
    return list(
        StreamingBlocks(Source(), tokenizer=tokenizer, block_size=size, mode=mode, tokenize=tokenize, **options)
    )


def predicted_ends(rows, suffix):
    """Of rows of (token, label of the next token): the tokens of text behind which the whole suffix is predicted.

    A part of it alone is refused, but for the single separator that stands between two documents of a row.
    """
    found = []
    for ids, labels in rows:
        for at, token in enumerate(ids):
            if token < FIRST_ID or token in suffix:
                continue
            behind = [labels[at + k] if at + k < len(labels) else -100 for k in range(len(suffix))]
            if tuple(behind) == suffix:
                found.append(token)
            elif behind[0] == 3:
                found.append(token)
            else:
                assert behind[0] not in suffix, "a part of the suffix is predicted"
    return found


def causal_rows(blocks, tokenizer):
    batch = DataCollatorForCausalLM(tokenizer)(blocks)
    return zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)


def encoder_rows(blocks, tokenizer):
    """A causal row of an encoder has each label at the token itself."""
    batch = DataCollatorForEncoder(tokenizer)([block | {"is_causal": True} for block in blocks])
    targets = np.zeros(batch["labels"].numel(), dtype=bool)
    targets[batch["target_positions"].numpy()] = True
    targets = targets.reshape(batch["labels"].shape)
    for ids, labels, is_target, mask in zip(
        batch["input_ids"].numpy(), batch["labels"].numpy(), targets, batch["attention_mask"].numpy(), strict=True
    ):
        kept = np.where(is_target, labels, -100)[mask == 1].tolist()
        yield ids[mask == 1].tolist(), [*kept[1:], -100]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_end_is_predicted_only_where_a_document_ends(mode, streams):
    """Also without `predicts_end=False`, which a Trainer sets where documents are joined."""
    rng = np.random.default_rng(MODES.index(mode))
    seen_cut = 0
    for number, template, side in itertools.product(range(4), SUFFIXES, ("right", "left")):
        columns, tokenizer = random_documents(rng), tokenizer_of(template, side)
        size = int(rng.integers(len(SUFFIXES[template]) + 2, 40))
        blocks = blocks_of(columns, tokenizer, size=size, mode=mode, streams=streams)
        ends = [row[-1] for row in columns["input_ids"] if row]
        collators = [causal_rows] if mode == "isolated_documents" else [causal_rows, encoder_rows]
        for rows in collators:
            found = predicted_ends(rows(blocks, tokenizer), SUFFIXES[template])
            assert len(found) == len(set(found)) and set(found) <= set(ends), (number, template, side, rows.__name__)
            if mode in ("doc_sentences", "isolated_documents"):
                # Each document ends somewhere, and that is learned.
                assert sorted(found) == ends
        seen_cut += len(blocks) > len(ends)
    assert seen_cut


def test_the_rows_of_pairs_beside_causal_ones_need_no_flag():
    """In a mixture some examples are no blocks."""
    tokenizer = tokenizer_of("[CLS] $A [SEP]")
    common = {"epoch": 0, "is_causal": True}
    cut = {"input_ids": [2, 7, 8, 3], "goes_on": np.full(4, True), "example_id": 0} | common
    whole = {"input_ids": [2, 9, 3], "example_id": 1} | common
    masked = {"input_ids": [2, 9, 10, 11, 3], "example_id": 2, "goes_on": [True] * 5} | common | {"is_causal": False}
    batch = DataCollatorForEncoder(tokenizer)([cut, whole, masked])
    assert batch["labels"].tolist()[:2] == [[-100, 7, 8, -100, -100], [-100, 9, 3, -100, -100]]


def documents(lengths):
    words = [[5 + (3 * n + k) % 50 for k in range(length)] for n, length in enumerate(lengths)]
    flags = [[k % 5 == 0 for k in range(length)] for length in lengths]
    return datasets.Dataset.from_dict(
        {"input_ids": words, "word_starts": [[True] * len(row) for row in words], "sent_starts": flags}
    )


@pytest.mark.parametrize("method", ["clm", "encoder"])
def test_trainers_of_documents_that_are_longer_than_a_row(tmp_path, method):
    """In doc_sentences a document of 40 tokens has three rows of 24; its end is predicted in the last alone."""
    inputs = {"train_dataset": documents([40, 10, 40]), "processing_class": tiny_tokenizer()}
    inputs["data_args"] = DataArguments(block_mode="doc_sentences", block_size=24)
    options = QUIET | {"output_dir": str(tmp_path)}
    if method == "clm":
        trainer = CausalLMTrainer(CausalLMModelArguments(**SIZES), CausalLMTrainingArguments(**options), **inputs)
    else:
        args = EncoderTrainingArguments(objectives=["clm"], **options)
        trainer = EncoderTrainer(ModelArguments(model_type="bert", **SIZES), args, **inputs)
        assert isinstance(trainer.train_dataset, CausalView)
    rows = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    assert [row["goes_on"].all() for row in rows] == [True, False, False, True, False]
    batch = trainer.data_collator(rows)
    ends = (batch["labels"] == tiny_tokenizer().sep_token_id).any(dim=1)
    assert ends.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("mode", ["full_rows", "tokens"])
def test_blocks_that_are_given_ready_are_marked_too(tmp_path, mode):
    """Nobody tells the Trainer how they were cut."""
    tokenizer = tiny_tokenizer()
    blocks = BlockDataset(documents([40, 10, 40]), tokenizer=tokenizer, block_size=24, mode=mode)
    options = CausalLMTrainingArguments(**QUIET | {"output_dir": str(tmp_path)})
    trainer = CausalLMTrainer(
        CausalLMModelArguments(**SIZES), options, train_dataset=blocks, processing_class=tokenizer
    )
    rows = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    labels = trainer.data_collator(rows)["labels"]
    for row, label in zip(rows, labels.tolist(), strict=True):
        kept = [each for each in label if each != -100]
        assert (len(kept) < len(row["input_ids"]) - 1) == bool(row["goes_on"][-1])
    assert any(row["goes_on"][-1] for row in rows)
