"""Whatever is typed for whichever options: they are taken, or refused in one line."""

import json
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_pretrain.cli import METHODS, load_method
from hf_pretrain.errors import InputError
from hf_pretrain.options import resolved_options, write_recipe
from hf_pretrain.training.arguments import check_training_options
from hf_pretrain.training.parsing import parse_arguments

# They would start a compiler, look for a launcher, or read a token.
LEFT_OUT = {
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "output_dir",
    "log_level",
    "ddp_backend",
    "use_cpu",
}
WORDS = [
    "",
    "true",
    "false",
    "none",
    "all",
    "auto",
    "steps",
    "epoch",
    "no",
    "best",
    "linear",
    "cosine",
    "constant",
    "polynomial",
]
WORDS += [
    "cosine_with_min_lr",
    "adafactor",
    "sgd",
    "lomo",
    "rmsprop",
    "adamw_torch",
    "wandb",
    "x",
    "a=1",
    "0:1",
    "0%:0.1,100%:nan",
]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "1.5",
    "-0.1",
    "1e-320",
    "1e308",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "1_0",
    "١",
    str(10**30),
]
VALUES = st.one_of(
    st.sampled_from(WORDS + NUMBERS),
    st.floats().map(str),
    st.integers().map(str),
    st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
        max_leaves=4,
    ).map(json.dumps),
)


def options_of(method):
    names = [known.name for cls in load_method(method).arguments for known in fields(cls) if known.init]
    return st.dictionaries(st.sampled_from(sorted(set(names) - LEFT_OUT)), VALUES, min_size=1, max_size=3)


def outcome(method, argv):
    """Parse and try the options of a method; return them, or None where they are refused in one line."""
    arguments = load_method(method).arguments
    try:
        instances = parse_arguments(arguments, argv, prog=f"hf-pretrain {method}", description="")
        check_training_options(instances[-1])
    except InputError as refused:
        assert str(refused).strip()
        return None
    return instances


@pytest.mark.parametrize("method", METHODS)
def test_no_value_of_an_option_ends_in_a_traceback(method, tmp_path):
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(options_of(method), st.booleans())
    def check(options, in_recipe):
        argv = ["--output_dir", str(tmp_path)]
        if in_recipe:
            path = tmp_path / "typed.yaml"
            path.write_text("".join(f"{name}: {value}\n" for name, value in options.items()), encoding="utf-8")
            argv += ["--config", str(path)]
        else:
            argv += [f"--{name}={value}" for name, value in options.items()]
        instances = outcome(method, argv)
        if instances is not None:
            # What is taken is a recipe that gives the same.
            write_recipe(resolved_options(instances), tmp_path / "r.yaml", program="toy")
            again = parse_arguments(
                [type(part) for part in instances], ["--config", str(tmp_path / "r.yaml")], prog="toy", description=""
            )
            assert resolved_options(again) == resolved_options(instances)

    check()
