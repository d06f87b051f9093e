"""Caches answer as the teacher did, in any order, and only for the teacher, data and tokenizer they were made with."""

import copy
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, set_seed

from helpers.method_matrix import VOCAB_SIZE, tiny_examples, tiny_tokenizer
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.observing.cache import (
    TaskLogitsCache,
    TopKCache,
    build_task_logits,
    build_top_k,
    cache_fingerprint,
    has_cache,
    top_k_targets,
    weights_fingerprint,
)
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
COUNT = 23


@pytest.fixture(scope="module")
def examples():
    return tiny_examples(COUNT, seed=0)


@pytest.fixture(scope="module")
def classifier():
    set_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(num_labels=3, **SIZES)).eval()


@pytest.fixture(scope="module")
def masked_lm():
    set_seed(0)
    return AutoModelForMaskedLM.from_config(BertConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def fingerprint(classifier, examples):
    return cache_fingerprint(classifier, examples, tiny_tokenizer())


def answers(model):
    def forward(batch):
        input_ids, valid = stack_column(batch, "input_ids")
        with torch.no_grad():
            return model(torch.from_numpy(input_ids), attention_mask=torch.from_numpy(valid.astype(np.int64))).logits

    return forward


def predictions(model, *, masking=None):
    """What a teacher says at the masked positions, as the collator masks them for the student."""
    collator = DataCollatorForMaskedLM(tiny_tokenizer(), masking=masking)
    head = GatheredHead(model)

    def forward(batch):
        inputs = collator(batch)
        labels, positions = inputs.pop("labels"), inputs.pop("target_positions")
        with evaluating(model):
            return head(model, positions, **inputs), (labels != -100).sum(dim=1)

    return forward


class TestTaskLogits:
    def test_cached_logits_are_live_ones_in_any_order(self, classifier, examples, fingerprint, tmp_path):
        cache = build_task_logits(answers(classifier), examples, tmp_path, fingerprint=fingerprint, batch_size=4)
        for ids in ([22, 0, 7], list(range(COUNT)), [5], torch.tensor([3, 3])):
            found = TaskLogitsCache.open(tmp_path, fingerprint=fingerprint).lookup(ids)
            live = torch.cat([answers(classifier)([examples[int(i)]]) for i in ids])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, live, atol=1e-5, rtol=0)
            assert torch.equal(found, cache.lookup(ids))

    def test_what_is_looked_up_may_be_written_to(self, classifier, examples, fingerprint, tmp_path):
        cache = build_task_logits(answers(classifier), examples, tmp_path, fingerprint=fingerprint)
        cache.lookup([1]).add_(1)
        torch.testing.assert_close(cache.lookup([1]), answers(classifier)([examples[1]]), atol=1e-5, rtol=0)

    def test_batches_are_of_one_length_and_no_example_is_asked_twice(self, examples, fingerprint, tmp_path):
        asked, spread = [], []

        def forward(batch):
            asked.extend(example["example_id"] for example in batch)
            lengths = [len(example["input_ids"]) for example in batch]
            spread.append(max(lengths) - min(lengths))
            return torch.tensor([[float(example["example_id"])] for example in batch])

        cache = build_task_logits(forward, examples, tmp_path, fingerprint=fingerprint, batch_size=4)
        assert sorted(asked) == list(range(COUNT)) and max(spread) < 12
        assert cache.lookup(range(COUNT))[:, 0].tolist() == list(range(COUNT))

    def test_an_example_that_is_not_there(self, classifier, examples, fingerprint, tmp_path):
        cache = build_task_logits(answers(classifier), examples, tmp_path, fingerprint=fingerprint)
        with pytest.raises(InputError, match="example 23 is not in the cache, which holds 23"):
            cache.lookup([0, 23])
        with pytest.raises(InputError, match="example -1"):
            cache.lookup([-1])


class TestFingerprint:
    """Each of the changes is one that would give other answers, and no other change refuses a cache."""

    def build(self, classifier, examples, folder):
        fingerprint = cache_fingerprint(classifier, examples, tiny_tokenizer(), seed=0)
        build_task_logits(answers(classifier), examples, folder, fingerprint=fingerprint)

    def refuse(self, folder, message, *args, **options):
        with pytest.raises(InputError, match=message):
            TaskLogitsCache.open(folder, fingerprint=cache_fingerprint(*args, **{"seed": 0, **options}))

    def test_what_is_another(self, classifier, examples, tmp_path):
        self.build(classifier, examples, tmp_path)
        other = copy.deepcopy(classifier)
        with torch.no_grad():
            other.classifier.bias[1] += 1e-3
        self.refuse(tmp_path, "another teacher:", other, examples, tiny_tokenizer())
        self.refuse(tmp_path, "another data:", classifier, examples.select(range(22)), tiny_tokenizer())
        reordered = examples.select([1, 0, *range(2, COUNT)])
        self.refuse(tmp_path, "another data:", classifier, reordered, tiny_tokenizer())
        changed = Dataset.from_list([{**row, "input_ids": [2, 9, *row["input_ids"][2:]]} for row in examples])
        self.refuse(tmp_path, "another data:", classifier, changed, tiny_tokenizer())
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["new"])
        self.refuse(tmp_path, "another tokenizer:", classifier, examples, tokenizer)
        self.refuse(tmp_path, "another seed:", classifier, examples, tiny_tokenizer(), seed=1)
        self.refuse(tmp_path, "another data and another teacher:", other, examples.select([0]), tiny_tokenizer())

    def test_where_a_row_ends_is_part_of_the_data(self, classifier):
        tokenizer = tiny_tokenizer()
        one, other = (
            cache_fingerprint(classifier, Dataset.from_dict({"input_ids": rows}), tokenizer)
            for rows in ([[5, 6, 7], [8]], [[5, 6], [7, 8]])
        )
        assert one["data"] != other["data"]

    def test_types_of_tokens_are_part_of_the_data(self, classifier):
        one, other = (
            cache_fingerprint(
                classifier, Dataset.from_dict({"input_ids": [[5, 6]], "token_type_ids": [types]}), tiny_tokenizer()
            )
            for types in ([0, 0], [0, 1])
        )
        assert one["data"] != other["data"]

    def test_a_dropout_or_an_activation_is_part_of_the_teacher(self, classifier):
        """The configuration decides, not the weights alone."""
        other = copy.deepcopy(classifier)
        other.config.hidden_act = "relu"
        assert weights_fingerprint(classifier) != weights_fingerprint(other)

    def test_what_is_the_same(self, classifier, examples, tmp_path):
        """A teacher saved and loaded, in training mode, with a tokenizer that has truncated."""
        self.build(classifier, examples, tmp_path / "cache")
        classifier.save_pretrained(tmp_path / "teacher")
        teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").train()
        tokenizer = tiny_tokenizer()
        tokenizer("w1 w2 w3", truncation=True, max_length=4, padding="max_length")
        same = Dataset.from_list(examples.to_list())
        fingerprint = cache_fingerprint(teacher, EpochDataset(same), tokenizer, seed=0)
        TaskLogitsCache.open(tmp_path / "cache", fingerprint=fingerprint)

    def test_half_precision_can_be_digested(self, classifier):
        half = copy.deepcopy(classifier).to(torch.bfloat16)
        assert weights_fingerprint(half) != weights_fingerprint(classifier)

    def test_what_is_not_finished_is_no_cache(self, examples, fingerprint, tmp_path):
        def fail(batch):
            raise KeyboardInterrupt

        assert not has_cache(tmp_path)
        with pytest.raises(InputError, match="no finished cache"):
            TaskLogitsCache.open(tmp_path, fingerprint=fingerprint)
        build_task_logits(lambda batch: torch.zeros(len(batch), 2), examples, tmp_path, fingerprint=fingerprint)
        assert has_cache(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            build_task_logits(fail, examples, tmp_path, fingerprint=fingerprint)
        assert not has_cache(tmp_path)

    @pytest.mark.parametrize("name", ["starts.npy", "logits.npy", "cache.json"])
    @pytest.mark.parametrize("is_gone", [True, False])
    def test_what_lost_a_file_is_no_cache(self, examples, fingerprint, tmp_path, name, is_gone):
        """The program then asks the teacher again."""
        build_task_logits(lambda batch: torch.zeros(len(batch), 2), examples, tmp_path, fingerprint=fingerprint)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        if not is_gone:
            (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert not has_cache(tmp_path)
        with pytest.raises(InputError, match="no finished cache"):
            TaskLogitsCache.open(tmp_path, fingerprint=fingerprint)

    def test_kinds_are_not_mixed_up(self, examples, fingerprint, tmp_path):
        build_task_logits(lambda batch: torch.zeros(len(batch), 2), examples, tmp_path, fingerprint=fingerprint)
        with pytest.raises(InputError, match="holds task logits, not top-k"):
            TopKCache.open(tmp_path, fingerprint=fingerprint)


class TestTopK:
    def build(self, model, examples, folder, *, k=8, masking=None, **options):
        fingerprint = cache_fingerprint(model, examples, tiny_tokenizer(), masking=masking)
        forward = predictions(model, masking=masking)
        return build_top_k(forward, examples, folder, fingerprint=fingerprint, k=k, batch_size=5, **options)

    def test_cached_predictions_are_live_ones_for_the_same_epoch_and_example(self, masked_lm, examples, tmp_path):
        cache, dataset = self.build(masked_lm, examples, tmp_path, num_epochs=3), EpochDataset(examples)
        assert cache.num_epochs == 3
        for ids, epochs in (([4, 17, 0], [2, 0, 1]), ([1, 2], [1, 1])):
            batch = [dataset[epoch * EPOCH_STRIDE + row] for row, epoch in zip(ids, epochs, strict=True)]
            logits, counts = predictions(masked_lm)(batch)
            live, found = top_k_targets(logits, k=8), cache.lookup(ids, epochs)
            assert len(found.ids) == counts.sum() == len(logits)
            assert torch.equal(found.ids, live.ids) and found.ids.dtype == torch.int64
            torch.testing.assert_close(found.log_probs, live.log_probs, atol=1e-2, rtol=1e-3)
            torch.testing.assert_close(found.tail, live.tail, atol=1e-2, rtol=1e-3)
            assert found.log_probs.dtype == found.tail.dtype == torch.float32

    def test_another_epoch_has_other_masks(self, masked_lm, examples, tmp_path):
        cache = self.build(masked_lm, examples, tmp_path, num_epochs=2)
        first, second = (cache.lookup(range(COUNT), epoch) for epoch in (0, 1))
        assert first.ids.shape != second.ids.shape or not torch.equal(first.ids, second.ids)

    def test_epochs_beyond_are_refused_with_what_to_do(self, masked_lm, examples, tmp_path):
        cache = self.build(masked_lm, examples, tmp_path, num_epochs=2)
        with pytest.raises(InputError, match="epoch 2 is not in the cache, which holds 2: .* static_masks=2"):
            cache.lookup([0], 2)

    def test_other_masks_are_refused(self, masked_lm, examples, tmp_path):
        self.build(masked_lm, examples, tmp_path, masking=MaskingArguments())
        other = cache_fingerprint(masked_lm, examples, tiny_tokenizer(), masking=MaskingArguments(mlm_probability=0.3))
        with pytest.raises(InputError, match="another masking"):
            TopKCache.open(tmp_path, fingerprint=other)

    def test_nothing_masked_is_nothing_to_keep(self, examples, fingerprint, tmp_path):
        with pytest.raises(InputError, match="at no position"):
            build_top_k(
                lambda batch: (torch.zeros(0, 9), torch.zeros(len(batch), dtype=torch.int64)),
                examples,
                tmp_path,
                fingerprint=fingerprint,
            )
        assert not has_cache(tmp_path)

    def test_size_on_disk(self, masked_lm, examples, tmp_path):
        """Six bytes a kept token and two for the tail."""
        cache = self.build(masked_lm, examples, tmp_path, k=16)
        files = sum(path.stat().st_size for path in tmp_path.glob("*.*16")) + (tmp_path / "ids.int32").stat().st_size
        assert files == len(cache.columns[0]) * (16 * 6 + 2)

    def test_the_folder_can_be_moved(self, masked_lm, examples, tmp_path):
        cache = self.build(masked_lm, examples, tmp_path / "here")
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        fingerprint = cache_fingerprint(masked_lm, examples, tiny_tokenizer(), masking=None)
        moved = TopKCache.open(tmp_path / "there", fingerprint=fingerprint)
        assert torch.equal(moved.lookup([3]).log_probs, cache.lookup([3]).log_probs)


def bucket_divergence(student, target, *, with_tail):
    """KL of the student from what is known of the teacher: its k best tokens, and all others as one or not at all."""
    log_probs = student.log_softmax(-1)
    mine, theirs = log_probs.gather(1, target.ids), target.log_probs
    if with_tail:
        rest = log_probs.scatter(1, target.ids, float("-inf")).logsumexp(-1)
        mine, theirs = torch.cat([mine, rest[:, None]], 1), torch.cat([theirs, target.tail[:, None]], 1)
    return (theirs.exp() * (theirs - mine)).sum(1)


class TestTail:
    vocabulary = 200

    def logits(self):
        set_seed(0)
        teacher = torch.randn(50, self.vocabulary) * 2
        return teacher, teacher + torch.randn(50, self.vocabulary)

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_all_mass_is_there(self, temperature):
        teacher, _ = self.logits()
        target = top_k_targets(teacher, k=10, temperature=temperature)
        assert torch.equal(target.ids, teacher.topk(10).indices)
        torch.testing.assert_close(target.log_probs.exp().sum(1) + target.tail.exp(), torch.ones(50))

    def test_divergence_grows_to_the_whole_with_k_and_is_never_negative(self):
        teacher, student = self.logits()
        whole = torch.nn.functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
        ).sum(1)
        values = [bucket_divergence(student, top_k_targets(teacher, k=k), with_tail=True) for k in (1, 4, 16, 64, 199)]
        for smaller, larger in zip(values, [*values[1:], whole], strict=True):
            assert (smaller >= 0).all() and (smaller <= larger + 1e-5).all()
        torch.testing.assert_close(values[-1], whole)

    def test_without_the_tail_it_goes_negative(self):
        """A student that puts more on the kept tokens than the teacher does is rewarded for it."""
        teacher, _ = self.logits()
        target = top_k_targets(teacher, k=4)
        greedy = teacher.scatter_add(1, target.ids, torch.full((50, 4), 2.0))
        assert (bucket_divergence(greedy, target, with_tail=False) < 0).all()
        assert (bucket_divergence(greedy, target, with_tail=True) > 0).all()

    def test_a_sure_teacher_has_a_tail_all_the_same(self):
        """One less the sum would be zero, and its logarithm no number."""
        target = top_k_targets(torch.tensor([[40.0, 0.0, 0.0]]), k=1)
        assert target.tail.item() == pytest.approx(np.log(2) - 40, rel=1e-5)

    def test_k_beyond_the_vocabulary(self):
        target = top_k_targets(torch.zeros(1, 5), k=64)
        assert target.ids.shape == (1, 5) and target.tail.item() == float("-inf")
