"""The code in the card of replaced token detection, run on what the same run exported, for each kind of head."""

import pytest
import torch

from helpers.method_matrix import NO_DROPOUT, build
from helpers.replaced_tokens import PROGRAM
from hf_pretrain.hub.card import snippets

TEXT = "The chef ate the meal."


@pytest.fixture(
    params=[("electra", "stock"), ("bert", "stock"), ("electra", "deberta_v3"), ("modernbert", "electra")],
    ids=lambda kind: "-".join(kind),
)
def trainer(request, tmp_path):
    """A run that has left its card behind."""
    model_type, head = request.param
    options = {"model_type": model_type, "discriminator_head": head, "generator_size": 1.0}
    options["config_overrides"] = None if model_type == "modernbert" else NO_DROPOUT
    trainer = build(PROGRAM, tmp_path, model_options=options, learning_rate=0.01)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def probabilities(model, inputs):
    """Of every token to be a replacement, by the model that was trained."""
    model.eval()
    with torch.no_grad():
        output = model.discriminator(**inputs)
        if model.discriminator_head is None:
            return output.logits.flatten().sigmoid()
        return model.discriminator_head(output.last_hidden_state).flatten().sigmoid()


def test_the_code_of_the_card_gives_what_was_trained(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "README.md").read_text()
    namespaces = []
    for code in snippets(card):
        namespaces.append({})
        exec(compile(code, "snippet", "exec"), namespaces[-1])
    encoder, used, *_ = namespaces
    expected = probabilities(trainer.model, trainer.processing_class(TEXT, return_tensors="pt"))
    assert encoder["hidden_states"].shape[-1] == trainer.model.discriminator.config.hidden_size
    if trainer.model.discriminator_head is None:
        torch.testing.assert_close(used["replaced"], expected[None], atol=1e-6, rtol=0)
        assert "hf_pretrain" not in snippets(card)[1], "stock transformers are enough"
    else:
        # A word and the point behind it are two words of the text, but the tokenizer knows white space only.
        assert [word.word for word in used["words"]] == [*TEXT[:-1].split(), "."]
        scores = torch.tensor([word.score for word in used["words"]])
        torch.testing.assert_close(scores[:-1], expected[1:-1], atol=1e-6, rtol=0)
        assert f"`{type(trainer.model.discriminator).__name__}`" in card
