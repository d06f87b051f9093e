"""ELMo's training: windows of both directions, batches, the draw of words, and a run from the command line to the export."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer

from helpers.method_matrix import METHODS, build, collate, tiny_data, tiny_tokenizer
from hf_pretrain import ElmoConfig, ElmoForPreTraining, ElmoModel, ElmoTokenizer, InputError, probe_accuracy
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.examples.windows import BidirectionalLaneDataset, LaneStream
from hf_pretrain.evaluation.probes import encode
from hf_pretrain.models.elmo.softmax_elmo import log_expected_counts
from hf_pretrain.objectives.elmo import METHOD, BidirectionalLMForPreTraining, DataCollatorForElmo, draw_negatives

IGNORED = -100
LANES = {"stateful": True, "unroll_length": 5, "eval_lanes": 4}


def stream(*, num_lanes, complete=False, lengths=(7, 12, 4)):
    ids = [list(range(10 * n, 10 * n + length)) for n, length in enumerate(lengths, 1)]
    flags = [[True] * length for length in lengths]
    rows = {"input_ids": ids, "word_starts": flags, "sent_starts": flags, "doc_id": list(range(len(ids)))}
    documents = Dataset.from_dict(rows, features=DOCUMENT_FEATURES)
    return LaneStream(documents, tokenizer=tiny_tokenizer(), num_lanes=num_lanes, complete=complete)


@pytest.mark.parametrize(
    ("num_lanes", "window", "complete"), [(2, 4, False), (3, 3, True), (4, 5, True), (1, 7, True)]
)
def test_each_direction_reads_its_lane_once_and_in_its_order(num_lanes, window, complete):
    lanes = stream(num_lanes=num_lanes, complete=complete)
    data = BidirectionalLaneDataset(lanes, window=window)
    for lane in range(num_lanes):
        text = lanes.read(lane, 0, lanes.lane_length)[0].tolist()
        windows = [data[time * num_lanes + lane] for time in range(data.num_windows)]
        read = {
            name: [int(i) for w in windows for i in w[name]] for name in windows[0] if name.endswith(("ids", "labels"))
        }
        assert read["labels"] == text and read["backward_labels"] == text[::-1]
        assert read["input_ids"][1:] == text[:-1] and read["backward_input_ids"][1:] == text[:0:-1]
        assert [w["memory_reset"] for w in windows] == [True] + [False] * (len(windows) - 1)
        if text:
            begin = lane * lanes.lane_length
            behind = lanes.read_range(begin + len(text), begin + len(text) + 1)[0].tolist() or [lanes.separator]
            assert read["backward_input_ids"][0] == behind[0]
        # Only the last window of a lane is short, for either direction: the states go on from full ones alone.
        for name in ("input_ids", "backward_input_ids"):
            lengths = [len(w[name]) for w in windows]
            full = len(text) // window
            assert lengths[:full] == [window] * full and sum(lengths) == len(text)


def test_blocks_have_the_neighbours_of_each_word_as_labels():
    batch = DataCollatorForElmo(pad_token_id=0)([{"input_ids": [2, 7, 8, 3]}, {"input_ids": [2, 9, 3]}])
    assert batch["labels"].tolist() == [[7, 8, 3, IGNORED], [9, 3, IGNORED, IGNORED]]
    assert batch["backward_labels"].tolist() == [[IGNORED, 2, 7, 8], [IGNORED, 2, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 1, 0]]


@pytest.fixture
def composite():
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "cell_size": 10, "filters": [[1, 4]], "hidden_dropout_prob": 0.0}
    model = ElmoForPreTraining(ElmoConfig(vocab_size=60, **sizes, embedding_type="tokens"))
    return BidirectionalLMForPreTraining.from_model(model)


@torch.no_grad()
def test_windows_with_their_states_are_the_whole_lane(composite):
    """The losses of a text that is read in windows are those of the text read at once, for both directions."""
    lanes = stream(num_lanes=1, complete=True)
    losses = {}
    for window in (26, 4):
        data, memory, sums = BidirectionalLaneDataset(lanes, window=window), None, []
        for time in range(data.num_windows):
            batch = DataCollatorForElmo()([data[time]])
            batch.pop("lanes")
            output = composite(**batch, memory=memory)
            memory = output.memory
            sums.append(torch.stack([output.losses[name].sum[0] for name in ("forward", "backward")]))
        losses[window] = torch.stack(sums).sum(0)
    torch.testing.assert_close(losses[26], losses[4])
    # And those of the model itself on the same words, with the separators around them.
    ids = torch.from_numpy(lanes.read_range(-1, 26)[0].astype(np.int64))
    forward, backward = composite.model.model(ids[None]).last_hidden_state[0].chunk(2, dim=-1)
    found = [composite.model.softmax.log_prob(half) for half in (forward, backward)]
    expected = -found[0][:-1].gather(-1, ids[1:, None]).sum()
    torch.testing.assert_close(losses[4][0], expected)


@torch.no_grad()
def test_what_the_host_finds_changes_nothing(composite):
    examples = [{"input_ids": [2, 7, 8, 7, 3]}, {"input_ids": [2, 9, 3]}]
    batch = DataCollatorForElmo()(examples)
    plain, known = composite(**batch), composite(**batch, **composite.host_inputs(batch, composite.config))
    for name, loss in plain.losses.items():
        torch.testing.assert_close(known.losses[name].sum, loss.sum)
    assert composite.host_inputs(batch, composite.config)["words"].tolist() == [0, 2, 3, 7, 8, 9]
    counts = composite.count_targets(batch)
    assert {name: int(count) for name, count in counts.items()} == {"forward": 6, "backward": 6}


def test_words_are_drawn_by_their_rank_without_repeats():
    """How often each is drawn is what the softmax takes off; the draw is a function of its key."""
    size, vocab_size, times = 20, 100, 1500
    counts, expected = np.zeros(vocab_size), torch.zeros(vocab_size)
    for seed in range(times):
        found = draw_negatives(size, vocab_size=vocab_size, seed=seed, epoch=1, number=2)
        assert len(set(found.ids.tolist())) == size
        counts[found.ids.numpy()] += 1
        expected += log_expected_counts(torch.arange(vocab_size), found.num_tries, vocab_size).exp()
    np.testing.assert_allclose(counts / times, expected / times, atol=0.05)
    assert counts[:5].min() > 2.5 * counts[-50:].mean()
    again = [
        draw_negatives(20, vocab_size=100, seed=0, epoch=e, number=n).ids.tolist()
        for e, n in ((1, 2), (1, 2), (2, 2), (1, 3))
    ]
    assert again[0] == again[1] and again[0] != again[2] and again[0] != again[3]


@pytest.mark.parametrize(
    "softmax",
    [{"softmax": "full"}, {"softmax": "sampled", "num_samples": 20}, {"softmax": "adaptive", "cutoffs": [10, 30]}],
    ids=["full", "sampled", "adaptive"],
)
def test_each_softmax_learns_in_lanes(softmax, tmp_path):
    options = LANES | {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 60, "warmup_steps": 0}
    trainer = build(METHOD, tmp_path, tiny_data(text="counts"), model_options=softmax, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("forward_loss", "backward_loss"):
        assert after[f"eval_{name}"] < 0.85 * before[f"eval_{name}"], name
    mean = (after["eval_forward_loss"] + after["eval_backward_loss"]) / 2
    assert after["eval_loss"] == pytest.approx(mean, rel=1e-5)
    assert after["eval_perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)


def test_the_gradient_of_lanes_does_not_depend_on_how_a_step_is_cut(tmp_path):
    found = []
    for batch, steps in ((8, 1), (2, 4)):
        options = LANES | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        softmax = {"softmax": "sampled", "num_samples": 20}
        trainer = build(METHOD, tmp_path / str(batch), model_options=softmax, **options)
        trainer.train()
        found.append(trainer.recorder.gradients)
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-3)


def test_the_states_go_on_in_lanes(tmp_path):
    """The second step of a run begins with the states of the first, not with zeros."""
    trainer = build(METHOD, tmp_path, **LANES, max_steps=1)
    trainer.train()
    kept = trainer._lane_memory.memory.states
    assert kept.shape[:3] == (4, 8, 1) and kept.any(-1).all()
    batch = collate(trainer, [trainer.train_dataset[8 + lane] for lane in range(8)])
    with torch.no_grad():
        on, anew = (trainer.model.eval()(**batch, memory=memory) for memory in (trainer._lane_memory.memory, None))
    assert not torch.allclose(on.losses["backward"].sum, anew.losses["backward"].sum)


def test_a_run_exports_a_model_and_a_tokenizer_that_know_every_word(tmp_path):
    from hf_pretrain.cli import main

    text = "\n\n".join(
        f"The {w} sat on the mat, and the dog number {i} saw it." for i, w in enumerate(["cat", "été"] * 60)
    )
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    argv = [
        "elmo",
        "--train_file",
        str(tmp_path / "corpus.txt"),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "2",
    ]
    argv += ["--hidden_size", "16", "--cell_size", "12", "--per_device_train_batch_size", "4", "--report_to", "none"]
    argv += [
        "--config_overrides",
        '{"filters": [[1, 4], [2, 4]]}',
        "--vocab_size",
        "100",
        "--validation_fraction",
        "0.1",
    ]
    argv += ["--use_cpu", "true", "--bf16", "false"]
    assert main(argv) == 0
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(model) is ElmoModel and type(tokenizer) is ElmoTokenizer
    inputs = tokenizer("The été zzz", return_tensors="pt")
    assert inputs.input_ids[0].tolist().count(tokenizer.unk_token_id) == 1
    with torch.no_grad():
        by_word, by_characters = model(inputs.input_ids), model(**inputs)
    torch.testing.assert_close(by_word.hidden_states[0][0, :3], by_characters.hidden_states[0][0, :3])
    assert not torch.allclose(by_word.hidden_states[0][0, 3], by_characters.hidden_states[0][0, 3])
    texts = ["the cat sat", "the dog saw it"] * 20
    for layer in (0, 1, -1):
        features = encode(model, tokenizer, texts, layer=layer)
        assert features.shape == (40, 16) and np.isfinite(features).all()
    assert probe_accuracy(features, [0, 1] * 20, features, [0, 1] * 20).accuracy == 1.0
    # It is trained further, with its own tokenizer.
    more = ["elmo", "--model_name_or_path", str(tmp_path / "out"), *argv[1:3], "--output_dir", str(tmp_path / "more")]
    more += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true"]
    assert main([*more, "--bf16", "false", "--validation_fraction", "0.1"]) == 0


def test_what_cannot_work_is_refused(tmp_path, composite):
    with pytest.raises(InputError, match="has no vocabulary"):
        sizes = {"hidden_size": 12, "cell_size": 10, "filters": [[1, 4]]}
        BidirectionalLMForPreTraining.from_arguments(
            METHODS["elmo"].load("elmo").arguments[1](), tiny_tokenizer(), stock=ElmoModel(ElmoConfig(**sizes))
        )
    with pytest.raises(InputError, match="isolated_documents"):
        composite.check_isolation(length=8)
    with pytest.raises(InputError, match="has no option no_such"):
        build(METHOD, tmp_path, model_options={"config_overrides": '{"no_such": 1}'})
    with pytest.raises(InputError, match="cannot be built"):
        build(METHOD, tmp_path, model_options={"cell_size": 4})
    composite.model.config.softmax = "sampled"
    with pytest.raises(InputError, match="no negatives"):
        composite.train()(**DataCollatorForElmo()([{"input_ids": [2, 7, 3]}]))
    from hf_pretrain import train_tokenizer
    from hf_pretrain.objectives.elmo.modeling import character_table

    pieces = train_tokenizer(["the cat sat on the mat"] * 5, kind="wordpiece", vocab_size=60)
    with pytest.raises(InputError, match="pieces of words"):
        character_table(pieces, max_characters=50)
