"""The two towers: what a position sees, what it never sees, and the distribution that comes of it."""

import math

import pytest
import torch
from transformers import AutoConfig

from hf_pretrain.errors import InputError
from hf_pretrain.modeling import kernels
from hf_pretrain.modeling.losses import IGNORED, sample_tokens
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.objectives.electric import TwoTowerClozeConfig, TwoTowerClozeModel, two_tower
from hf_pretrain.objectives.electric.two_tower import build_two_tower

VOCAB_SIZE = 50
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 1,
}
FURTHER = {
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "modernbert": {
        # The first layer sees all, the others two tokens to each side.
        "local_attention": 4,
        **{f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")},
    },
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "position_biased_input": False,
    },
}
BACKBONES = ["bert", "roberta", "electra", "albert", "modernbert", "deberta-v2", "distilbert"]
# Positions are those of the row where they are absolute and not counted from the padding.
SHIFTABLE = ["roberta", "deberta-v2", "modernbert"]
LENGTH = 9


def configuration(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**SIZES, **FURTHER.get(model_type, {}), **changes})


def make(model_type="bert", excluded=(0, 1), backend=None, **changes):
    torch.manual_seed(0)
    config = configuration(model_type, **changes)
    return build_two_tower(config, excluded_token_ids=list(excluded), attn_implementation=backend).eval()


def tokens(*shape, seed=0):
    return torch.randint(5, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def mask_of(padding):
    """One whole row and one with two tokens of padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, {"left": slice(0, 2), "right": slice(-2, None)}[padding]] = 0
    return mask


def jacobian_norms(model, ids, mask, **inputs):
    """Return [B, L, L]: how the states of a position (second index) depend on the embedding of a token (third)."""
    leaf = model.get_input_embeddings().weight[ids].detach().requires_grad_()
    handles = [
        tower.get_input_embeddings().register_forward_hook(lambda module, args, output: leaf)
        for tower in (model.left_tower, model.right_tower)
    ]
    states = model.context_states(ids, mask, **inputs)
    for handle in handles:
        handle.remove()
    weights = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1))
    rows = []
    for position in range(ids.shape[1]):
        (gradient,) = torch.autograd.grad((states[:, position] @ weights).sum(), leaf, retain_graph=True)
        rows.append(gradient.abs().amax(-1))
    return torch.stack(rows, dim=1)


class TestWhatAPositionSees:
    @pytest.mark.parametrize("padding", ["left", "right"])
    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_all_tokens_but_its_own_and_no_padding(self, backbone, padding):
        """Through three layers, at the first and the last token and beside padding."""
        mask = mask_of(padding)
        norms = jacobian_norms(make(backbone), tokens(2, LENGTH), mask)
        is_real = mask.bool()
        own = torch.eye(LENGTH, dtype=torch.bool)
        seen = norms > 0
        expected = is_real[:, :, None] & is_real[:, None, :] & ~own
        assert torch.equal(seen[is_real], expected[is_real])
        assert norms.diagonal(dim1=1, dim2=2).abs().max() == 0

    @pytest.mark.parametrize("backbone", ["bert", "modernbert", "roberta"])
    def test_eager_attention_gives_the_same(self, backbone):
        ids, mask = tokens(2, LENGTH), mask_of("right")
        outputs = [make(backbone, backend=backend).context_states(ids, mask) for backend in ("sdpa", "eager")]
        torch.testing.assert_close(*(states[mask.bool()] for states in outputs), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_the_ends_have_a_zero_state(self, backbone):
        model = make(backbone)
        states = model.context_states(tokens(2, LENGTH), mask_of("right"))
        half = states.shape[-1] // 2
        assert not states[:, 0, :half].any()
        assert not states[0, -1, half:].any() and not states[1, -3, half:].any()
        assert states[:, 0, half:].any() and states[0, -1, :half].any()

    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_padding_changes_nothing(self, backbone):
        model, ids = make(backbone), tokens(1, LENGTH)
        alone = model.context_states(ids, torch.ones_like(ids))
        filler = torch.full((1, 3), 1)
        for side in ("right", "left") if backbone in SHIFTABLE else ("right",):
            parts = (ids, filler) if side == "right" else (filler, ids)
            padded = torch.cat(parts, dim=1)
            states = model.context_states(padded, (padded != 1).long())
            kept = states[:, :LENGTH] if side == "right" else states[:, 3:]
            torch.testing.assert_close(kept, alone, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("backbone", ["bert", "roberta", "modernbert", "deberta-v2", "ibert"])
    def test_documents_of_a_row_do_not_see_each_other(self, backbone):
        model = make(backbone)
        first, second = tokens(1, 5), tokens(1, 4, seed=1)
        together = torch.cat([first, second, torch.full((1, 2), 1)], dim=1)
        documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 2])
        positions = torch.tensor([[*range(5), *range(4), 0, 0]])
        inputs = {"document_ids": documents, "position_ids": positions}
        states = model.context_states(together, (documents >= 0).long(), **inputs)
        for ids, kept in ((first, states[:, :5]), (second, states[:, 5:9])):
            alone = model.context_states(ids, torch.ones_like(ids))
            torch.testing.assert_close(kept, alone, atol=1e-5, rtol=0)

    def test_a_sliding_layer_sees_as_far_as_its_window(self):
        model = make("modernbert", num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
        ids = tokens(1, 12)
        norms = jacobian_norms(model, ids, torch.ones_like(ids))[0]
        distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()
        # The neighbour's state is two layers of a window of two away.
        assert torch.equal(norms > 0, (distance > 0) & (distance <= 1 + 2 * 2))

    def test_the_positions_of_roberta_do_not_depend_on_the_tokens(self):
        model, ids = make("roberta"), tokens(1, LENGTH)
        other = ids.clone()
        other[0, 3] = model.config.tower.pad_token_id
        states, changed = (model.context_states(row, torch.ones_like(row)) for row in (ids, other))
        assert torch.equal(states[0, 3], changed[0, 3])

    def test_further_inputs_reach_both_towers(self):
        model, ids = make(), tokens(1, LENGTH)
        mask = torch.ones_like(ids)
        plain = model.context_states(ids, mask)
        typed = model.context_states(ids, mask, token_type_ids=torch.ones_like(ids))
        half = plain.shape[-1] // 2
        for part in (slice(0, half), slice(half, None)):
            assert not torch.equal(plain[0, 4, part], typed[0, 4, part])


class TestRefused:
    @pytest.mark.parametrize(
        ("model_type", "changes"),
        [
            ("fnet", {}),
            ("convbert", {}),
            ("mobilebert", {}),
            ("nystromformer", {}),
            ("mra", {}),
            ("longformer", {"attention_window": 4}),
            ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
        ],
    )
    def test_what_would_see_more_or_less(self, model_type, changes):
        with pytest.raises(InputError, match=f"model_type='{model_type}' cannot be Electric's generator"):
            make(model_type, **changes)

    def test_a_backend_without_masks(self):
        with pytest.raises(InputError, match="attn_implementation='flex_attention'"):
            make("bert", backend="flex_attention")

    @pytest.mark.parametrize("backbone", [*BACKBONES, "ibert"])
    def test_a_row_of_documents_is_tried_out(self, backbone):
        model = make(backbone).train()
        state = torch.random.get_rng_state()
        model.check_isolation(length=40)
        assert model.training and model.left_tower.training and torch.equal(state, torch.random.get_rng_state())

    def test_towers_that_mix_documents_are_refused_by_name(self, monkeypatch):
        """The silent traps: a mask that knows no documents, positions that count on or from the wrong place, an error."""
        model = make("roberta")
        position_inputs, sees_within = rules.position_inputs, rules.sees_within

        def of_one_document(documents, orders):
            return sees_within(torch.zeros_like(documents), orders)

        def of_the_row(plan, positions):
            return position_inputs(plan, torch.arange(positions.shape[1]).expand_as(positions))

        def of_bert(plan, positions):
            return {"position_ids": positions}

        def failing(documents, orders):
            assert documents.dim() == 1, "a mask of its own"

        for attribute, wrong, reason in (
            ("sees_within", of_one_document, "the states of a document change"),
            ("position_inputs", of_the_row, "are not those that it has alone"),
            ("position_inputs", of_bert, "are not those that it has alone"),
            ("sees_within", failing, "its forward fails with such a mask"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(rules, attribute, wrong)
                with pytest.raises(InputError, match=f"model_type='roberta'.*cannot isolate documents: .*{reason}"):
                    model.check_isolation(length=40)
        model.check_isolation(length=40)

    def test_the_probe_leaves_no_trace(self):
        state = torch.random.get_rng_state()
        model = TwoTowerClozeModel(TwoTowerClozeConfig(tower=configuration("bert")))
        assert model.training and model.left_tower.training
        torch.random.set_rng_state(state)
        again = TwoTowerClozeModel(TwoTowerClozeConfig(tower=configuration("bert")))
        assert torch.equal(model.dense.weight, again.dense.weight)


class TestDistribution:
    def test_it_is_normalised_over_what_is_not_excluded(self):
        model, ids = make(excluded=[0, 1, 7, 49]), tokens(2, LENGTH)
        probabilities = model(ids).logits.softmax(-1)
        assert not probabilities[..., [0, 1, 7, 49]].any()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, LENGTH))
        assert (probabilities > 0).sum(-1).unique().tolist() == [VOCAB_SIZE - 4]

    def test_log_probabilities_are_those_of_the_logits(self):
        model, ids = make(), tokens(2, LENGTH)
        expected = model(ids).logits.log_softmax(-1)
        states = model.context_states(ids, torch.ones_like(ids)).flatten(0, 1)
        log_probs = model.log_probs(states, ids.flatten())
        torch.testing.assert_close(log_probs, expected.flatten(0, 1).gather(-1, ids.view(-1, 1)).squeeze(-1))
        uniforms = torch.rand(len(states), generator=torch.Generator().manual_seed(0))
        drawn, their_log_probs = model.sample(states, uniforms)
        flat = expected.flatten(0, 1)
        assert torch.equal(drawn, sample_tokens(flat, uniforms, excluded=model.excluded_tokens))
        torch.testing.assert_close(their_log_probs, flat.gather(-1, drawn[:, None]).squeeze(-1))
        assert not their_log_probs.requires_grad

    def test_chunks_give_the_same_losses_and_gradients_and_bound_the_logits(self, monkeypatch):
        ids, results, rows = tokens(4, LENGTH), [], []
        for at_once in (2**25, 7 * VOCAB_SIZE):
            monkeypatch.setattr(kernels, "CHUNK_LOGITS", at_once)
            model = make()
            original = model.logits
            monkeypatch.setattr(model, "logits", lambda states, run=original: rows.append(len(states)) or run(states))
            states = model.context_states(ids, torch.ones_like(ids)).flatten(0, 1)
            log_probs = model.log_probs(states, ids.flatten())
            (-log_probs.sum()).backward()
            sample = model.sample(states, torch.full((len(states),), 0.4))
            results.append((log_probs.detach(), sample, {n: p.grad for n, p in model.named_parameters()}))
        assert max(rows) == 36 and rows[-1] <= 7
        (one, sample, gradients), (chunked, other_sample, other_gradients) = results
        torch.testing.assert_close(chunked, one)
        assert torch.equal(sample[0], other_sample[0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("at_once", [2**25, 7 * VOCAB_SIZE])
    @pytest.mark.parametrize("where", ["in float16", "compiled"])
    def test_gradients_with_the_losses_are_those_of_logits_that_are_made_again(self, monkeypatch, where, at_once):
        """In float16 a gradient vanishes before it is multiplied, and a compiler makes one kernel of logits and losses."""
        ids, results = tokens(4, LENGTH), []
        wanted = ids.flatten().masked_fill(torch.arange(ids.numel()) % 5 == 2, IGNORED)
        monkeypatch.setattr(kernels, "CHUNK_LOGITS", at_once)
        for is_early in (True, False):
            if not is_early:
                monkeypatch.delattr(two_tower, "linear_cross_entropy")
                if where == "compiled":
                    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
                else:
                    monkeypatch.setattr(kernels, "compute_dtype", lambda weight: torch.float16)
            model = make(excluded=[0, 1, 3])
            states = model.context_states(ids, torch.ones_like(ids)).flatten(0, 1)
            log_probs = model.log_probs(states, wanted)
            assert not log_probs[wanted == IGNORED].any()
            (-log_probs.sum() / 3).backward()
            results.append((log_probs.detach(), {n: p.grad for n, p in model.named_parameters()}))
        (early, gradients), (again, other_gradients) = results
        torch.testing.assert_close(early, again)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4)

    def test_every_parameter_learns(self):
        """Distributed training waits for every gradient; a stock pooler would have none."""
        for backbone in BACKBONES:
            model, ids = make(backbone), tokens(2, LENGTH)
            states = model.context_states(ids, torch.ones_like(ids)).flatten(0, 1)
            model.log_probs(states, ids.flatten()).sum().backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
            assert math.isfinite(sum(float(p.grad.norm()) for p in model.parameters()))


class TestSharingAndSaving:
    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_the_towers_share_their_embeddings_before_and_after_loading(self, tmp_path, backbone):
        model, ids = make(backbone, excluded=[0, 1, 3]), tokens(2, LENGTH)
        model.save_pretrained(tmp_path)
        loaded, info = TwoTowerClozeModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for one in (model, loaded):
            table = one.left_tower.get_input_embeddings().weight
            assert table is one.right_tower.get_input_embeddings().weight
            norms = [
                {n: p for n, p in tower.embeddings.named_parameters() if "norm" in n.lower()}
                for tower in (one.left_tower, one.right_tower)
            ]
            assert norms[0] and all(norms[0][name] is norms[1][name] for name in norms[0])
            assert one.num_parameters() == sum(p.numel() for p in one.parameters())
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
        assert torch.equal(loaded.excluded_tokens, model.excluded_tokens)
