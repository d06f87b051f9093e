"""The recipes of vectors as programs: each trains on text, and its export opens with both libraries."""

import json

import pytest
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from helpers.tiny_text import THINGS, write_models, write_text
from hf_pretrain import cli
from hf_pretrain.data import draws

RECIPES = [name for name, (method, _) in cli.RECIPES.items() if method == "contrastive"]
SHORT = """--max_steps 3 --per_device_train_batch_size 8 --save_strategy no --logging_steps 1 --eval_strategy no --use_cpu true
    --block_size 32""".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with text and tiny models, in which a test runs."""
    write_text(tmp_path)
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    """Run the program, and return the row of its last evaluation."""
    assert cli.main([*argv, "--output_dir", "out"]) == 0
    model, info = AutoModel.from_pretrained("out", output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "pooler" not in key]
    with open("out/trainer_state.json") as file:
        log = json.load(file)["log_history"]
    return [row for row in log if "eval_loss" in row][-1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_its_export_opens_both_ways(name, folder):
    more = ["--gradient_accumulation_steps", "2"] if name == "ict" else []
    row = run(name, "--model_name_or_path", "my-bert", "--train_file", "corpus.txt", *SHORT, *more)
    losses = {key[5:-5] for key in row if key.endswith("_loss") and key != "eval_loss"}
    expected = {"infoword": {"contrastive", "mlm"}, "retromae": {"bottleneck", "mlm"}, "tsdae": {"bottleneck"}}
    assert losses == expected.get(name, {"contrastive"})
    assert all(0 < row[f"eval_{loss}_loss"] < 12 for loss in losses)
    model = SentenceTransformer("out", device="cpu")
    assert model.encode(["The ship was fine today."]).shape == (1, 32) and model.max_seq_length == 32
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in card and "SentenceTransformer(" in card
    assert "| Examples |" in card and "Block mode" not in card
    # The recipe of a run starts it again.
    options = yaml.safe_load((folder / "out" / "recipe.yaml").read_text())
    assert name in (options.get("objective"), options.get("views")) or name == "simcse"
    assert cli.main(["contrastive", "--config", "out/recipe.yaml", "--output_dir", "again"]) == 0


def test_pairs_with_hard_negatives_and_a_file_of_scores(folder):
    """Which sentence answers which is learned from given pairs; scores of people are compared with the cosines."""
    numbers = draws.integers(draws.row_keys(range(200), seed=3, stream="pairs"), 3, high=len(THINGS)).tolist()
    rows = [
        {
            "anchor": f"Where is the {THINGS[a]}?",
            "positive": f"The {THINGS[a]} was {b}.",
            "negative": f"The {THINGS[c]} was poor.",
        }
        for a, b, c in numbers
        if a != c
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [(f"The {THINGS[a]} was fine.", f"The {THINGS[b]} was fine.", 5.0 * (a == b)) for a, b, _ in numbers]
    (folder / "sts.csv").write_text("".join(f"{a},{b},{score}\n" for a, b, score in scored))
    options = ["--similarity_file", "sts.csv", "--hard_negative_weight", "0.5", "--learning_rate", "1e-3"]
    argv = [
        "contrastive",
        "--views",
        "pairs",
        "--train_file",
        "pairs.jsonl",
        "--model_name_or_path",
        "my-bert",
        *SHORT,
    ]
    argv[argv.index("3")] = "60"
    row = run(*argv, *options, "--validation_fraction", "0.2", "--eval_on_start", "true")
    before = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert row["eval_contrastive_loss"] < 0.7 * before["eval_contrastive_loss"]
    assert row["eval_similarity_spearman"] > 0.5


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--objective", "tsdae", "--views", "ict"], "views='ict' has no effect"),
        (["--scorer", "cross"], "compares a text with itself"),
        (["--views", "ict", "--text_unit", "block"], "text_unit='block' has no effect"),
        (["--mlm_probability", "0.3"], "beside"),
        (["--generator_size", "0.5"], "beside"),
        (["--block_mode", "isolated_documents"], "doc_sentences"),
        (["--block_mode", "full_sentences"], "use 'doc_sentences'"),
        (["--streaming", "true", "--max_steps", "3"], "leave out streaming"),
        (["--views", "pairs", "--model_name_or_path", "missing"], "missing"),
        (["--views", "pairs"], "needs a tokenizer"),
        (["--similarity_file", "missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_is_one_line_before_any_text_is_read(argv, said, folder, capsys):
    (folder / "corpus.txt").write_text("")  # Reading it would be refused otherwise.
    assert cli.main(["contrastive", "--train_file", "corpus.txt", "--output_dir", "out", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error, error


def test_text_of_one_document_is_refused(folder, capsys):
    (folder / "one.txt").write_text("The cat was fine. The ship was poor. The garden was fine. The river was poor.")
    argv = ["--train_file", "one.txt", "--validation_fraction", "0", "--model_name_or_path", "my-bert", *SHORT]
    assert cli.main(["contrastive", *argv, "--output_dir", "out"]) == 2
    assert "one document only" in capsys.readouterr().err
