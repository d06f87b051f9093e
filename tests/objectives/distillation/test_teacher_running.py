"""Where and how the teacher runs: its device, and its layers under torch.compile."""

import copy

import pytest
import torch
from transformers import BertModel

from helpers.distilled import arguments, bert, collator, examples, pair
from helpers.method_matrix import build
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing.capture import AttentionRecord
from hf_pretrain.modeling.observing.outputs import ModelOutputs, OutputRequest
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import Teacher, join

COMPILED = "prediction", "mlm", "cosine", "embedding", "hidden"


@pytest.fixture
def graphs(monkeypatch):
    """Compile without generating code, and keep what is compiled."""
    seen, compile_function = [], torch.compile

    def keep(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend=keep))
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


class TestCompiled:
    def test_it_answers_as_before(self, graphs):
        """At every length, and with one compilation for all layers."""
        plain, compiled = (pair(*COMPILED, teacher_compile=compiles) for compiles in (False, True))
        assert len(graphs) == 1
        for batch in (collator()(examples()), collator(pad_to_multiple_of=32)(examples()), collator()(examples(2))):
            expected = plain(**batch).losses
            for name, loss in compiled(**batch).losses.items():
                torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert 1 < len(graphs) <= 4

    def test_others_find_the_model_as_it_was(self, graphs):
        """Such as a copy in another type, which is compared with the student, and timed beside it."""
        joined = pair(*COMPILED, teacher_compile=True)
        model = joined.teacher.model
        assert not any("forward" in vars(layer) for layer in model.bert.encoder.layer)
        copied = copy.deepcopy(joined)
        with torch.no_grad():
            copied.teacher.model.bert.encoder.layer[0].output.dense.weight.zero_()
        batch = collator()(examples())
        before, after = (one(**batch).losses["hidden"].sum for one in (joined, copied))
        assert not torch.allclose(before, after)

    def test_it_is_trained_with(self, graphs, tmp_path):
        options = {"attention_weight": 0.0, "relation_vv_weight": 0.0, "max_steps": 3}
        logs = []
        for compiles in (False, True):
            trainer = build(distil, tmp_path / str(compiles), teacher_compile=compiles, **options)
            trainer.train()
            logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert graphs and logs[1] == pytest.approx(logs[0], rel=1e-5)

    @pytest.mark.parametrize("name", ["attention", "relation_vv", "attention_distribution"])
    def test_what_looks_into_its_layers_is_refused(self, name):
        with pytest.raises(InputError, match="teacher_compile=True"):
            pair(name, teacher=bert(seed=3), teacher_compile=True)

    @pytest.mark.slow
    def test_with_generated_code(self):
        torch._dynamo.reset()
        plain, compiled = (pair(*COMPILED, teacher_compile=compiles) for compiles in (False, True))
        batch = collator()(examples())
        expected = plain(**batch).losses
        for name, loss in compiled(**batch).losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-4, msg=name)


class TestDevice:
    def test_on_one_that_is_named(self):
        joined, other = pair("prediction", "hidden", teacher_device="cpu"), pair("prediction", "hidden")
        assert joined.teacher.device == torch.device("cpu") and other.teacher.device is None
        batch = collator()(examples())
        for name, loss in joined(**batch).losses.items():
            torch.testing.assert_close(loss, other(**batch).losses[name])

    @pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
    def test_one_that_is_not_there_is_refused(self, device):
        with pytest.raises(InputError, match=f"teacher_device='{device}' cannot be used"):
            pair("hidden", teacher_device=device)

    def test_all_that_was_seen_comes_back(self):
        states = torch.zeros(1, 2, 3, 4)
        seen = ModelOutputs(torch.zeros(2, 5), None, {1: states[0]}, {2: AttentionRecord(states, states, states, 1.0)})
        moved = seen.to(torch.device("meta"))
        record = moved.attention[2]
        assert record.bias is None and record._replace(bias=states).to(torch.device("meta")).bias.is_meta
        assert all(one.is_meta for one in (moved.logits, moved.hidden[1], record.query, record.key, record.value))

    @pytest.mark.gpu
    def test_another_than_the_students(self):
        names = ("prediction", "cosine", "attention", "relation_vv")
        joined = pair(*names, teacher_device="cpu", teacher=bert(seed=3)).to("cuda")
        batch = {name: values.cuda() for name, values in collator()(examples()).items()}
        losses = joined(**batch).losses
        assert joined.teacher.model.device.type == "cpu"
        expected = pair(*names, teacher=bert(seed=3)).to("cuda")(**batch).losses
        for name, loss in losses.items():
            assert loss.sum.is_cuda
            torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_it_is_joined_where_no_graph_is_wanted():
    """What no loss reaches is found by a backward pass all the same."""
    with torch.no_grad():
        joined = join(bert(BertModel), bert(BertModel, num_hidden_layers=4), arguments("hidden"))
    assert any(parameter.requires_grad for parameter in joined.student.parameters())
    assert not torch.is_inference_mode_enabled() and isinstance(joined.teacher, Teacher)
    assert joined.teacher.request == OutputRequest(hidden=(2, 4))
