"""Contrastive losses against their definitions, candidate by candidate, and however a step is cut."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import contrastive_worker
from helpers.made_tensors import MadeTensors
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.contrastive import losses
from hf_pretrain.objectives.contrastive.losses import (
    ContrastiveObjective,
    VectorBatch,
    alignment,
    cross_encoder_loss,
    gather_batch,
    surrogate,
    uniformity,
    vector_gradients,
)

OBJECTIVES = {
    "infonce": ContrastiveObjective(hard_negative_weight=0.7),
    "dot": ContrastiveObjective(similarity="dot", temperature=1.5, hard_negative_weight=-0.4),
    "infoword": ContrastiveObjective(similarity="dot", temperature=1.0, same_document_counts=True),
    "ranking": ContrastiveObjective(loss="ranking", margin=0.4),
    "ranking-dot": ContrastiveObjective(loss="ranking", similarity="dot", margin=0.5, same_document_counts=True),
}
# The smallest batch with every exclusion: two documents of several examples, one example that does not count, equal texts.
DOCUMENTS = (0, 0, 1, -1, 2, 1)
EQUAL_TEXTS = {
    # A positive and the positive, the anchor, and a hard negative of other examples.
    (1, 2): (1, 4),
    (1, 0): (0, 4),
    (2, 5): (1, 1),
    # Hard negatives: one is its own anchor, one its own positive, two of other examples are equal to each other.
    (2, 2): (0, 2),
    (3, 0): (1, 0),
    (2, 1): (3, 4),
    # The view "same": anchor and positive are one text.
    (1, 5): (0, 5),
}


@pytest.fixture(params=list(OBJECTIVES))
def objective(request):
    return OBJECTIVES[request.param]


def batch_of(documents=DOCUMENTS, *, roles=4, width=5, equal=EQUAL_TEXTS, dtype=torch.float64, seed=0):
    size = len(documents)
    vectors = torch.randn(roles * size, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    keys = torch.arange(roles * size).view(roles, size) + 2**40
    for (role, example), source in equal.items():
        keys[role, example] = keys[source]
    return VectorBatch(vectors.requires_grad_(), torch.tensor(documents), keys.flatten())


def distinct(size, **options):
    return batch_of(range(size), equal={}, **options)


def counting_candidates(objective, batch, example):
    """Roles and examples of the negatives of an anchor, by the rules one after another."""
    size, roles = batch.num_examples, batch.num_roles
    keys = batch.text_keys.view(roles, size).tolist()
    documents = batch.documents.tolist()
    found = []
    for role in range(1, roles):
        for other in range(size):
            if (role, other) == (1, example) or documents[other] == -1:
                continue
            if keys[role][other] in (keys[0][example], keys[1][example]):
                continue
            is_own = other == example
            if documents[other] == documents[example] and not is_own and not objective.same_document_counts:
                continue
            found.append((role, other))
    return found


def by_loops(objective, batch):
    """Losses and right answers, one score at a time."""
    vectors = batch.vectors.view(batch.num_roles, batch.num_examples, -1)
    values, right = [], []
    for example, document in enumerate(batch.documents.tolist()):
        if document == -1:
            values.append(torch.zeros((), dtype=vectors.dtype))
            right.append(0.0)
            continue

        def score(role, other, anchor=vectors[0, example]):
            product = anchor @ vectors[role, other]
            if objective.similarity == "cosine":
                product = product / (anchor.norm() * vectors[role, other].norm())
            return product / objective.temperature if objective.loss == "infonce" else product

        positive, wrong = score(1, example), []
        for role, other in counting_candidates(objective, batch, example):
            own = role > 1 and other == example
            wrong.append(score(role, other) + (objective.hard_negative_weight if own else 0))
        if not wrong:
            values.append(positive * 0)
        elif objective.loss == "infonce":
            exponentials = sum(one.exp() for one in (positive, *wrong))
            values.append(-(positive.exp() / exponentials).log())
        else:
            values.append(sum((objective.margin - positive + one).clamp(min=0) for one in wrong) / len(wrong))
        right.append(float(all(positive > one for one in wrong)))
    return torch.stack(values), torch.tensor(right)


def gradient_of(objective, batch, everyone=None, offset=0):
    result = objective(batch, batch if everyone is None else everyone, offset)
    return torch.autograd.grad(result.losses.sum(), batch.vectors)[0]


def with_rows(batch, rows):
    """The batch with the vectors of some ``(role, example)`` replaced."""
    vectors = batch.vectors.detach().clone()
    for (role, example), row in rows.items():
        vectors[role * batch.num_examples + example] = row
    return batch._replace(vectors=vectors.requires_grad_())


class TestDefinition:
    def test_losses_answers_and_gradients_are_those_of_loops(self, objective):
        batch = batch_of()
        result = objective(batch, batch)
        expected, right = by_loops(objective, batch)
        torch.testing.assert_close(result.losses, expected)
        assert result.correct.tolist() == right.tolist() and 0 < sum(right) < 5
        assert result.counts.tolist() == [1, 1, 1, 0, 1, 1]
        torch.testing.assert_close(
            gradient_of(objective, batch), torch.autograd.grad(expected.sum(), batch.vectors)[0]
        )

    def test_numbers_of_negatives_counted_by_hand(self):
        """Of 3 texts of each of 5 examples, less its positive, an anchor loses its document's and those equal to two keys."""
        for same_document_counts, expected in ((False, [10, 10, 9, 11, 11]), (True, [13, 13, 12, 11, 14])):
            objective, batch = ContrastiveObjective(same_document_counts=same_document_counts), batch_of()
            numbers = [len(counting_candidates(objective, batch, example)) for example in (0, 1, 2, 4, 5)]
            assert numbers == expected
            alike = batch._replace(vectors=torch.ones_like(batch.vectors))
            found = objective(alike, alike).losses[torch.tensor([0, 1, 2, 4, 5])]
            torch.testing.assert_close(found, (torch.tensor(expected) + 1).double().log())

    @pytest.mark.parametrize("roles", [2, 3, 4])
    def test_any_number_of_hard_negatives(self, objective, roles):
        batch = distinct(5, roles=roles)
        torch.testing.assert_close(objective(batch, batch).losses, by_loops(objective, batch)[0])

    def test_gradient_is_that_of_differences(self, objective):
        batch = batch_of()

        def losses_of(vectors):
            changed = batch._replace(vectors=vectors)
            return objective(changed, changed).losses

        assert torch.autograd.gradcheck(losses_of, (batch.vectors,))

    @pytest.mark.parametrize("temperature", [0.05, 2.0])
    def test_equal_vectors_cost_the_log_of_the_number_of_candidates(self, temperature):
        batch = batch_of(equal={})
        batch = batch._replace(vectors=torch.ones_like(batch.vectors))
        found = ContrastiveObjective(temperature=temperature)(batch, batch)
        # One positive, and of each of three roles: examples that count and are of another document; own hard negatives.
        candidates = torch.tensor([1 + 3 * 3 + 2, 1 + 3 * 3 + 2, 1 + 3 * 3 + 2, 1, 1 + 3 * 4 + 2, 1 + 3 * 3 + 2])
        torch.testing.assert_close(found.losses, candidates.double().log())
        # A model whose vectors are all alike has learned nothing.
        assert found.correct.sum() == 0

    def test_equal_vectors_cost_the_margin(self):
        batch = distinct(6)
        batch = batch._replace(vectors=torch.ones_like(batch.vectors))
        found = ContrastiveObjective(loss="ranking", margin=0.3)(batch, batch)
        torch.testing.assert_close(found.losses, torch.full_like(found.losses, 0.3))

    def test_the_loss_is_small_where_the_positive_is_far_ahead_and_keeps_its_digits(self):
        vectors = torch.eye(4).repeat(2, 1)
        batch = VectorBatch(vectors, torch.arange(4), torch.arange(8))
        found = ContrastiveObjective()(batch, batch).losses
        torch.testing.assert_close(found, torch.full((4,), 3 * math.exp(-20)), rtol=1e-5, atol=0)

    def test_temperature_does_not_change_the_ranking(self):
        batch = batch_of()
        found = [ContrastiveObjective(loss="ranking", temperature=t)(batch, batch).losses for t in (0.05, 3.0)]
        assert torch.equal(*found)


class TestExclusions:
    @pytest.mark.parametrize("roles", [(1, 4), (2, 0), (3, 2), (0, 4)])
    def test_candidates_of_other_examples_change_what_they_should(self, objective, roles):
        """Each candidate is edited: only the losses of the anchors that it counts for may change, and these must."""
        batch = batch_of()
        # Far along the anchors' own direction, so that no hinge is flat.
        edited = with_rows(batch, {roles: batch.vectors.detach().view(4, 6, 5)[0].sum(0)})
        before, after = (objective(one, one).losses for one in (batch, edited))
        changed = (before != after).tolist()
        for example in range(6):
            depends = roles in counting_candidates(objective, batch, example) or roles in ((0, example), (1, example))
            if batch.documents[example] == -1 or not depends:
                assert not changed[example]
            elif objective.loss == "infonce":
                assert changed[example]

    def test_texts_of_one_document_and_equal_texts_change_nothing(self):
        objective = ContrastiveObjective(temperature=0.5)
        batch = batch_of()
        before = objective(batch, batch).losses
        # For example 0: both hard negatives of its document's other example, and a positive equal to its own.
        edited = with_rows(batch, {(2, 1): 9.0, (3, 1): -9.0, (1, 1): 7.0})
        assert torch.equal(objective(edited, edited).losses[0], before[0])
        infoword = replace(objective, same_document_counts=True)
        assert not torch.equal(infoword(edited, edited).losses[0], infoword(batch, batch).losses[0])
        # Example 4's positive equals that of example 2, whatever the documents.
        for one in (objective, infoword):
            edited = with_rows(batch, {(1, 2): 9.0})
            assert torch.equal(one(edited, edited).losses[4], one(batch, batch).losses[4])

    def test_an_example_that_does_not_count_may_hold_anything(self, objective):
        batch = batch_of()
        edited = with_rows(batch, {(role, 3): math.nan for role in range(4)})
        before, after = objective(batch, batch), objective(edited, edited)
        assert all(torch.equal(*values) for values in zip(before, after, strict=True))
        gradient = gradient_of(objective, edited).view(4, 6, 5)
        torch.testing.assert_close(gradient, gradient_of(objective, batch).view(4, 6, 5))
        assert not gradient[:, 3].any()

    def test_the_weight_changes_own_hard_negatives_alone(self):
        batch = distinct(5, roles=3)
        vectors = batch.vectors.detach()
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        logits = unit[:5] @ unit[5:].T / 0.3
        logits[:, 5:] += 1.3 * torch.eye(5, dtype=torch.float64)
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
        found = ContrastiveObjective(temperature=0.3, hard_negative_weight=1.3)(batch, batch)
        torch.testing.assert_close(found.losses, expected)

    def test_without_hard_negatives_the_weight_does_nothing(self):
        batch = distinct(5, roles=2)
        plain, weighted = (ContrastiveObjective(hard_negative_weight=weight)(batch, batch) for weight in (0.0, 2.0))
        assert torch.equal(plain.losses, weighted.losses)

    @pytest.mark.parametrize(
        "batch",
        [batch_of([4], roles=2, equal={}), batch_of([3, 3, 3], roles=2, equal={}), batch_of([-1, -1], equal={})],
        ids=["one example", "one document", "fillers"],
    )
    def test_without_a_negative_nothing_is_learned(self, batch):
        for objective in (ContrastiveObjective(), ContrastiveObjective(loss="ranking")):
            result = objective(batch, batch)
            assert result.losses.tolist() == [0.0] * batch.num_examples
            assert result.counts.tolist() == (batch.documents != -1).tolist()
            # Nothing on the way back is no number either.
            with torch.autograd.set_detect_anomaly(True):
                assert not gradient_of(objective, batch).any()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_half_precision_vectors_are_compared_in_fp32(self, objective, dtype):
        exact = batch_of()
        batch = exact._replace(vectors=exact.vectors.detach().to(dtype).requires_grad_())
        reference = exact._replace(vectors=batch.vectors.detach().double().requires_grad_())
        result = objective(batch, batch)
        assert [values.dtype for values in result] == [torch.float32] * 3
        torch.testing.assert_close(result.losses, objective(reference, reference).losses.float(), rtol=1e-4, atol=1e-5)
        gradient = gradient_of(objective, batch)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, gradient_of(objective, reference).to(dtype), rtol=2e-2, atol=2e-3)

    def test_autocast_changes_no_bit(self, objective):
        batch = batch_of(dtype=torch.float32)
        expected, gradient = objective(batch, batch).losses, gradient_of(objective, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = objective(batch, batch)
            assert torch.equal(vector_gradients(objective, [batch]).gradients[0], gradient)
            assert uniformity(batch.vectors, documents=torch.arange(24)).sum.dtype == torch.float32
        assert torch.equal(result.losses, expected)
        # The scores are computed again here.
        assert torch.equal(torch.autograd.grad(result.losses.sum(), batch.vectors)[0], gradient)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("value", [0.0, 1e-7, 2e4])
    def test_vectors_of_any_length_give_finite_losses_and_gradients(self, objective, dtype, value):
        batch = batch_of(dtype=torch.float32)
        edited = with_rows(batch, {(0, 0): value, (1, 4): value, (2, 5): value})
        edited = edited._replace(vectors=edited.vectors.detach().to(dtype).requires_grad_())
        assert objective(edited, edited).losses.isfinite().all()
        gradient = gradient_of(objective, edited)
        assert gradient.isfinite().all() and gradient.abs().max() > 0

    def test_the_cosine_of_a_vector_of_zeros_is_zero(self):
        batch = with_rows(distinct(5, roles=2), {(0, 1): 0.0})
        objective = ContrastiveObjective()
        torch.testing.assert_close(objective(batch, batch).losses[1], torch.tensor(math.log(5)).double())
        assert not gradient_of(objective, batch)[1].any()

    def test_cosines_do_not_depend_on_lengths(self):
        batch = batch_of(dtype=torch.float32)
        scales = torch.logspace(-4, 4, 24)[:, None]
        scaled = batch._replace(vectors=batch.vectors * scales)
        objective = ContrastiveObjective()
        torch.testing.assert_close(objective(scaled, scaled).losses, objective(batch, batch).losses)


class TestChunks:
    @pytest.mark.parametrize("at_once", [1, 24, 50, 90])
    def test_chunks_of_anchors_change_nothing(self, objective, at_once, monkeypatch):
        batch = batch_of()
        expected, gradient = objective(batch, batch), gradient_of(objective, batch)
        monkeypatch.setattr(losses, "_SCORES_AT_ONCE", at_once)
        found = objective(batch, batch)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient_of(objective, batch), gradient)

    def test_no_matrix_has_all_scores_and_none_is_held(self, objective, monkeypatch):
        batch = distinct(40)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: kept.append(saved.numel()) or saved, lambda one: one
        ):
            result = objective(batch, batch)
        assert kept and max(kept) <= batch.vectors.numel()
        monkeypatch.setattr(losses, "_SCORES_AT_ONCE", 1600)
        with MadeTensors() as made:
            objective(batch, batch)
            torch.autograd.grad(objective(batch, batch).losses.sum(), batch.vectors)
        assert 800 <= made.most <= 1600 < 40 * 120
        assert result.losses.shape == (40,)


class TestParts:
    @pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2], [1, 3, 2]])
    def test_join_undoes_take_apart(self, sizes):
        batch = batch_of()
        parts = batch.take_apart(sizes)
        assert [part.num_examples for part in parts] == sizes and {part.num_roles for part in parts} == {4}
        # The second text of the last example.
        assert torch.equal(parts[-1].vectors[2 * sizes[-1] - 1], batch.vectors[11])
        assert torch.equal(parts[-1].text_keys[2 * sizes[-1] - 1], batch.text_keys[11])
        assert all(torch.equal(*values) for values in zip(VectorBatch.join(parts), batch, strict=True))

    @pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [2, 3, 1]])
    def test_own_anchors_among_all_examples(self, objective, sizes):
        """Each part is what a rank has: its losses are those of the whole, and the parts' gradients add up to the whole's."""
        whole = batch_of()
        expected = objective(whole, whole)
        offset, total = 0, 0
        for part in whole.take_apart(sizes):
            found = objective(part, whole, offset)
            for values, all_values in zip(found, expected, strict=True):
                torch.testing.assert_close(values, all_values[offset : offset + part.num_examples])
            total = total + found.losses.sum()
            offset += part.num_examples
        gradient = torch.autograd.grad(total, whole.vectors)[0]
        torch.testing.assert_close(gradient, gradient_of(objective, whole))

    @pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2], [1, 3, 2]])
    def test_cached_gradients_are_those_of_the_whole_batch(self, objective, sizes):
        whole = batch_of()
        result, gradient = objective(whole, whole), gradient_of(objective, whole)
        parts = [
            part._replace(vectors=part.vectors.detach().clone().requires_grad_()) for part in whole.take_apart(sizes)
        ]
        with torch.no_grad():
            found = vector_gradients(objective, parts)
        assert not any(one.requires_grad for values in found for one in values)
        torch.testing.assert_close(torch.cat(found.losses), result.losses)
        torch.testing.assert_close(torch.cat(found.correct), result.correct)
        for part, values, gradients in zip(parts, found.losses, found.gradients, strict=True):
            carried = surrogate(values, part.vectors, gradients)
            assert torch.equal(carried, values)
            # A Trainer divides by a count.
            (carried.sum() / 4).backward()
        carried = VectorBatch.join([part._replace(vectors=part.vectors.grad) for part in parts]).vectors
        torch.testing.assert_close(carried, gradient / 4, rtol=1e-6, atol=1e-12)

    def test_a_surrogate_carries_each_example_by_itself(self):
        vectors, gradients = torch.randn(2, 6, 3)
        carried = surrogate(torch.ones(2), vectors.requires_grad_(), gradients)
        (carried * torch.tensor([1.0, 0.0])).sum().backward()
        kept = torch.tensor([1.0, 0.0]).repeat(3)[:, None]
        torch.testing.assert_close(vectors.grad, gradients * kept)

    def test_gradients_of_half_precision_vectors_are_kept_in_fp32(self):
        batch = batch_of()
        half = batch._replace(vectors=batch.vectors.detach().bfloat16().requires_grad_())
        found = vector_gradients(ContrastiveObjective(), [half])
        assert found.gradients[0].dtype == torch.float32
        surrogate(found.losses[0], half.vectors, found.gradients[0]).sum().backward()
        assert torch.equal(half.vectors.grad, found.gradients[0].bfloat16())

    def test_one_process_gathers_nothing(self):
        batch = batch_of()
        everyone, offset = gather_batch(batch)
        assert everyone is batch and offset == 0


class TestTwoRanks:
    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory):
        folder = tmp_path_factory.mktemp("contrastive")
        run_on_two_ranks("helpers.contrastive_worker", folder)
        return folder

    @pytest.mark.parametrize("largest", contrastive_worker.LARGEST)
    @pytest.mark.parametrize("name", contrastive_worker.OBJECTIVES)
    @pytest.mark.parametrize("path", ["whole", "cached"])
    def test_two_ranks_are_one_process(self, folder, path, name, largest):
        model = contrastive_worker.encoder()
        whole = contrastive_worker.encoded(model, contrastive_worker.whole_batch())
        expected = contrastive_worker.OBJECTIVES[name](whole, whole)
        (expected.losses.sum() / 6).backward()
        ranks = [torch.load(folder / f"{path}-{name}-{largest}-{rank}.pt") for rank in range(2)]
        for number, values in ((0, expected.losses), (1, expected.correct)):
            torch.testing.assert_close(torch.cat([rank[number] for rank in ranks]), values, rtol=1e-5, atol=1e-6)
        for _, _, gradients in ranks:
            for found, weight in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(found, weight.grad, rtol=1e-5, atol=5e-6)
                assert weight.grad.abs().max() > 1e-3


class TestCrossEncoder:
    SCORES = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, -2.0], [9.0, 9.0, 9.0]])
    DOCUMENTS = torch.tensor([0, 0, 5, -1])

    def test_infonce_is_a_cross_entropy(self):
        scores = self.SCORES.clone().requires_grad_()
        result = cross_encoder_loss(scores, documents=self.DOCUMENTS)
        expected = torch.nn.functional.cross_entropy(self.SCORES, torch.zeros(4, dtype=torch.long), reduction="none")
        torch.testing.assert_close(result.losses, expected * torch.tensor([1, 1, 1, 0]))
        assert result.counts.tolist() == [1, 1, 1, 0] and result.correct.tolist() == [1, 0, 0, 0]
        result.losses.sum().backward()
        share = self.SCORES.softmax(1) - torch.tensor([1.0, 0, 0])
        share[3] = 0
        torch.testing.assert_close(scores.grad, share)

    def test_ranking_is_a_mean_of_hinges(self):
        result = cross_encoder_loss(self.SCORES, documents=self.DOCUMENTS, loss="ranking", margin=2.0)
        assert result.losses.tolist() == [0.25, (5 + 3) / 2, (2 + 0) / 2, 0]
        assert self.SCORES[0].tolist() == [2.0, -1.0, 0.5]

    @pytest.mark.parametrize("loss", ["infonce", "ranking"])
    def test_extreme_scores(self, loss):
        scores = torch.tensor([[-3e4, 3e4], [3e4, -3e4], [math.nan, math.inf]], dtype=torch.float16).requires_grad_()
        result = cross_encoder_loss(scores, documents=torch.tensor([0, 1, -1]), loss=loss)
        assert result.losses.dtype == torch.float32
        torch.testing.assert_close(result.losses, torch.tensor([6e4, 0, 0]), rtol=1e-3, atol=0)
        result.losses.sum().backward()
        assert scores.grad.isfinite().all() and scores.grad[0].tolist() == [-1, 1]

    def test_an_unknown_loss_is_refused(self):
        with pytest.raises(InputError, match=r"loss='infonec' .*did you mean 'infonce'"):
            cross_encoder_loss(self.SCORES, documents=self.DOCUMENTS, loss="infonec")


class TestSpread:
    def test_alignment_is_the_squared_distance_of_directions(self):
        anchors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
        positives = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-2.0, -2.0], [math.nan, 1.0]])
        result = alignment(anchors, positives, documents=torch.tensor([0, 1, 1, -1]))
        torch.testing.assert_close(result.sum, torch.tensor([0.0, 2.0, 4.0, 0.0]))
        assert result.count.tolist() == [1, 1, 1, 0]

    def test_uniformity_is_the_log_of_a_mean_over_pairs(self):
        vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
        documents = torch.tensor([0, 0, -1, 1, 2, 3, -1])
        unit = torch.nn.functional.normalize(vectors[documents != -1], dim=1)
        expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
        vectors[2] = math.nan
        result = uniformity(vectors, documents=documents)
        assert result.count.tolist() == [1, 1, 0, 1, 1, 1, 0]
        torch.testing.assert_close(result.sum, expected * result.count)

    def test_uniformity_of_one_point_and_of_none(self):
        alike = uniformity(torch.ones(4, 3), documents=torch.arange(4))
        torch.testing.assert_close(alike.sum, torch.zeros(4), atol=1e-5, rtol=0)
        for documents in ([3], [-1, 3], [-1, -1]):
            result = uniformity(torch.randn(len(documents), 3), documents=torch.tensor(documents))
            assert not result.count.any() and not result.sum.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(objective, dtype):
    """On `meta`, whatever asks for a value raises."""
    encoder = torch.nn.Linear(5, 5, device="meta", dtype=dtype)
    parts = [
        VectorBatch(*(values.detach().to("meta") for values in part))
        for part in batch_of(dtype=dtype).take_apart([4, 2])
    ]
    encoded = [part._replace(vectors=encoder(part.vectors)) for part in parts]
    objective(encoded[0], *gather_batch(encoded[0])).losses.sum().backward()
    found = vector_gradients(objective, encoded)
    for part, values, gradients in zip(encoded[1:], found.losses[1:], found.gradients[1:], strict=True):
        surrogate(values, part.vectors, gradients).sum().backward()
    assert encoder.weight.grad.is_meta
    anchors, positives, documents = parts[0].vectors[:4], parts[0].vectors[4:8], parts[0].documents
    assert alignment(anchors, positives, documents=documents).sum.is_meta
    assert uniformity(anchors, documents=documents).sum.is_meta
    assert cross_encoder_loss(anchors, documents=documents, loss=objective.loss).losses.is_meta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "triplet"}, "loss='triplet' must be one of infonce, ranking"),
        ({"similarity": "cosin"}, "similarity='cosin' .*did you mean 'cosine'"),
        ({"temperature": 0.0}, "temperature=0.0 must be a number above 0; 0.05 is usual"),
        ({"margin": -1.0}, "margin=-1.0 must be a number of at least 0"),
        ({"hard_negative_weight": math.inf}, "hard_negative_weight=inf must be a number that is finite"),
        (
            {"loss": "ranking", "hard_negative_weight": 1.0},
            "hard_negative_weight=1.0 has no effect with loss='ranking'",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ContrastiveObjective(**options)
