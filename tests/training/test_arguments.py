"""The options that every method has: what is chosen for the user, what is refused."""

from dataclasses import fields

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers.method_matrix import build, programs
from hf_pretrain.cli import METHODS
from hf_pretrain.errors import InputError, types_of
from hf_pretrain.training import arguments as arguments_module
from hf_pretrain.training.arguments import REFUSED, PretrainingArguments, check_training_options
from hf_pretrain.training.parsing import check_needs, parse_arguments


@pytest.fixture
def make(tmp_path):
    return lambda **options: PretrainingArguments(output_dir=str(tmp_path), **options)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    monkeypatch.setattr(arguments_module, "bf16_is_fast", lambda: request.param)
    return request.param


def test_bf16_is_chosen_where_it_is_fast(make, fast):
    args = make()
    assert args.bf16 is fast
    assert args.mixed_precision == ("bf16" if fast else "no")


@pytest.mark.parametrize("told", [True, False])
def test_what_is_told_wins(make, fast, told):
    assert make(bf16=told).bf16 is told


def test_fp16_keeps_bf16_off(make, fast):
    args = make(fp16=True)
    assert args.bf16 is False
    assert args.mixed_precision == "fp16"


def test_the_command_line_can_tell(tmp_path, fast):
    def parse(*argv):
        options = ["--output_dir", str(tmp_path), *argv]
        return parse_arguments([PretrainingArguments], options, prog="toy", description="A toy.")[0]

    assert parse().bf16 is fast
    assert parse("--bf16").bf16 is True
    assert parse("--bf16", "true").bf16 is True
    assert parse("--bf16", "false").bf16 is False


def test_without_an_accelerator_the_cpu_is_used_without_being_named(make, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    args = make(bf16=True)
    assert args.use_cpu and args.device.type == "cpu" and args.bf16


def test_with_an_accelerator_the_cpu_is_not_forced(make, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert not make(bf16=False).use_cpu
    assert make(bf16=False, use_cpu=True).use_cpu


def test_columns_are_kept(make):
    assert make().remove_unused_columns is False
    with pytest.raises(InputError, match="remove_unused_columns=True is not supported: it would drop example ids"):
        make(remove_unused_columns=True)


def test_tokens_are_counted_once(make):
    with pytest.raises(InputError, match="num_tokens is in every log row"):
        make(include_num_input_tokens_seen="all")


def test_the_product_schedule_is_linear_only(make):
    assert make(decay_during_warmup=True).lr_scheduler_type == "linear"
    with pytest.raises(InputError, match="decay_during_warmup=True is the linear schedule's, not cosine's"):
        make(decay_during_warmup=True, lr_scheduler_type="cosine")
    assert make(lr_scheduler_type="cosine").lr_scheduler_type == "cosine"


def test_the_product_schedule_is_refused_on_the_command_line_too(tmp_path):
    """The default of rtd, with the schedule alone changed."""
    options = ["--output_dir", str(tmp_path), "--lr_scheduler_type", "cosine"]
    with pytest.raises(InputError, match="not cosine's: drop one of the two"):
        parse_arguments(programs()["rtd"].arguments, options, prog="hf-pretrain rtd", description="")
    last = parse_arguments(
        programs()["rtd"].arguments,
        [*options, "--decay_during_warmup", "false"],
        prog="hf-pretrain rtd",
        description="",
    )[-1]
    assert last.lr_scheduler_type == "cosine"


def test_batches_are_never_sent_from_rank_0(make):
    """Gathered targets are no column that could be cut along the batch."""
    assert make().accelerator_config.dispatch_batches is False
    assert make(accelerator_config={"split_batches": False}).accelerator_config.dispatch_batches is False


def test_defaults_suit_pre_training(make):
    args = make()
    assert args.logging_nan_inf_filter is False
    assert args.ddp_find_unused_parameters is False
    assert args.adam_bias_correction and not args.decay_during_warmup
    assert not args.overwrite_output_dir
    assert args.eval_on_start


# What is honoured, and refused


# Options of `transformers.TrainingArguments` that have an effect, by what honours them.
HONOURED: dict[str, str] = {
    "the stock training loop": """
        output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps max_grad_norm
        auto_find_batch_size torch_empty_cache_steps neftune_noise_alpha resume_from_checkpoint ignore_data_skip
        restore_callback_states_from_checkpoint logging_nan_inf_filter""",
    "the stock optimizer and schedule": """
        learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2
        adam_epsilon optim_target_modules""",
    "the stock evaluation loop": """
        eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start eval_accumulation_steps
        load_best_model_at_end metric_for_best_model greater_is_better""",
    "the stock callbacks": """
        logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to
        run_name project trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug""",
    "the checkpoints": """
        save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint""",
    "the pushes to the Hub": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "the samplers and the data loaders": """
        seed data_seed full_determinism dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order""",
    "the device and the launcher": """
        use_cpu local_rank bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs accelerator_config fsdp fsdp_config
        deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
        ddp_timeout""",
    "eval_strategy, which sets it": "do_eval",
}
HONOURED_NAMES = [name for names in HONOURED.values() for name in names.split()]


def test_every_option_of_transformers_is_honoured_or_refused():
    """One that a newer transformers adds fails here until somebody has looked who reads it."""
    names = [known.name for known in fields(TrainingArguments)]
    assert sorted([*HONOURED_NAMES, *REFUSED]) == sorted(names)


# Read in `__post_init__`, by a launcher, on another device, or where a run is pushed or reported.
NOT_READ_HERE = (
    "hub_model_id hub_strategy hub_always_push hub_revision hub_token hub_private_repo run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id ddp_backend deepspeed local_rank use_cpu tf32 gradient_checkpointing "
    "gradient_checkpointing_kwargs do_eval torch_compile_mode activation_checkpointing_kwargs optim_target_modules "
    "log_level_replica bf16 fp16 torch_compile ddp_timeout fsdp_config"
).split()


def test_what_is_called_honoured_is_read(tmp_path, data):
    """Not in `__post_init__`, but by the Trainer while it trains, evaluates, saves and goes on."""
    read = set()

    def recording(self, name):
        read.add(name)
        return object.__getattribute__(self, name)

    def trainer(**options):
        options |= {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "max_steps": 2}
        return build(programs()["mlm"], tmp_path, data, load_best_model_at_end=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        args_class = programs()["mlm"].arguments[2]
        made = args_class.__post_init__
        patch.setattr(args_class, "__post_init__", lambda self: (made(self), read.clear())[0])
        patch.setattr(args_class, "__getattribute__", recording)
        read_by_first = set()
        for options in ({"max_steps": 1}, {"resume_from_checkpoint": "true"}):
            run = trainer(**options)
            run.train(resume_from_checkpoint=run.args.resume_from_checkpoint is not None)
            read_by_first |= read
    unread = set(HONOURED_NAMES) - read_by_first - set(NOT_READ_HERE)
    assert not unread


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused_by_name(make, name):
    only = REFUSED[name][0]
    other = {bool: not only, str: f"{only}x", float: 0.25, list: ["inputs"]}.get(type(only), ["labels"])
    with pytest.raises(InputError, match=f"^{name}=.* is not supported: .*leave it out$"):
        make(**{name: other})
    assert getattr(make(**{name: only}), name) == only


def test_the_task_distillation_groups_by_length_and_nothing_else(make, tmp_path):
    args_class = programs()["distil-task"].arguments[2]
    for strategy in ("random", "group_by_length"):
        assert args_class(output_dir=str(tmp_path), train_sampling_strategy=strategy)
    with pytest.raises(InputError, match="train_sampling_strategy='sequential' is not supported"):
        args_class(output_dir=str(tmp_path), train_sampling_strategy="sequential")
    with pytest.raises(InputError, match="train_sampling_strategy='group_by_length' is not supported"):
        make(train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("config", [{"dispatch_batches": True}, {"use_seedable_sampler": False}])
def test_settings_of_accelerate_without_effect_are_refused(make, config):
    with pytest.raises(InputError, match=f"accelerator_config: {next(iter(config))}"):
        make(accelerator_config=config)


# Numbers


@pytest.mark.parametrize("method", METHODS)
def test_no_number_of_any_method_may_be_nan_or_infinite(method, tmp_path):
    """Whatever the option: the check is one, and a new option has it."""
    for options_class in programs()[method].arguments:
        given = {"output_dir": str(tmp_path)} if issubclass(options_class, TrainingArguments) else {}
        for known in fields(options_class):
            kinds = types_of(options_class, known.name)
            for value in ("nan", "inf", "-inf") if float in kinds else ():
                with pytest.raises(InputError, match=f"^{known.name}={value} "):
                    parse_arguments([options_class], argv(given | {known.name: value}), prog="toy", description="")
            if int in kinds:
                with pytest.raises(InputError, match=known.name):
                    parse_arguments([options_class], argv(given | {known.name: 10**30}), prog="toy", description="")


def argv(options):
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 0}, "must be at least 1; the default is 8"),
        ({"per_device_eval_batch_size": -1}, "must be at least 1; the default is 8"),
        ({"gradient_accumulation_steps": -1}, "must be at least 1; the default is 1"),
        ({"learning_rate": -1.0}, "must be at least 0; the default is 0.0005"),
        ({"weight_decay": -0.1}, "must be at least 0"),
        ({"max_grad_norm": -1.0}, "must be at least 0"),
        ({"max_grad_norm": float("inf")}, "must be a number of at least 0"),
        ({"adam_beta1": 1.0}, "must be a number from 0 to below 1; the default is 0.9"),
        ({"adam_beta2": -0.1}, "must be a number from 0 to below 1; the default is 0.999"),
        ({"adam_epsilon": 0.0}, "must be a number above 0 and at most 1"),
        ({"seed": -1}, "must be at least 0; the default is 42"),
        ({"seed": 2**64}, "must be at most 4294967295; the default is 42"),
        ({"data_seed": -1}, "must be at least 0"),
        ({"dataloader_num_workers": -1}, "must be a whole number from 0 to 1024"),
        ({"neftune_noise_alpha": -1.0}, "must be above 0"),
        ({"num_train_epochs": -1}, "must be at least 0"),
        ({"max_steps": -5}, "must be at least -1"),
        ({"max_steps": 2.5}, "must be a whole number"),
        ({"warmup_steps": -0.1}, "must be at least 0"),
        ({"save_steps": 0}, "must be above 0"),
        ({"logging_steps": -1}, "must be at least 0"),
        ({"ddp_timeout": 0}, "must be at least 1"),
        ({"learning_rate": "5e-4"}, "a number of at least 0"),
        ({"lr_scheduler_kwargs": {"min_lr": [float("nan")]}}, "each number in it"),
        ({"dataloader_persistent_workers": True}, "set dataloader_num_workers too"),
    ],
)
def test_numbers_out_of_range_are_refused_in_python_too(make, options, said):
    name, value = next(iter(options.items()))
    with pytest.raises(InputError) as refused:
        make(**options)
    assert str(refused.value).startswith(f"{name}={value!r}") and said in str(refused.value)


def test_the_values_of_a_schedule_lie_where_those_of_its_option_do(tmp_path):
    def rtd(**options):
        return programs()["rtd"].arguments[2](output_dir=str(tmp_path), **options)

    assert rtd(temperature="0:1, 10:0.5", rtd_weight="0:0, 10:50")
    for name, text in (
        ("temperature", "0:0"),
        ("rtd_weight", "0:-1"),
        ("mlm_probability", "0:1.1"),
        ("temperature", "0:inf"),
        ("temperature", "inf:1"),
    ):
        with pytest.raises(InputError, match=f"{name}='{text}'"):
            rtd(**{name: text})


def test_masks_of_nothing_are_refused(tmp_path):
    mlm, encoder = programs()["mlm"].arguments[2], programs()["encoder"].arguments[2]
    with pytest.raises(InputError, match="mlm_probability=0.0 leaves no target"):
        mlm(output_dir=str(tmp_path), mlm_probability=0.0)
    assert mlm(output_dir=str(tmp_path), mlm_probability="0:0.1, 9:0")
    assert encoder(output_dir=str(tmp_path), mlm_probability=0.0, mlm_weight=0.0, objectives=["mlm", "sop"])


# What only transformers, accelerate and torch know


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type=cosine_with_min_lr with lr_scheduler_kwargs={}: ",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type='warmup_stable_decay' needs the length of the decay: ",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"x": 1}}, "lr_scheduler_kwargs={'x': 1}: "),
        ({"lr_scheduler_kwargs": {"x": 1}, "decay_during_warmup": True}, "has no effect with decay_during_warmup"),
        ({"optim": "adamw_8bit"}, "pip install -U bitsandbytes"),
        ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, "pip install"),
        ({"optim": "lomo"}, "pip install"),
        (
            {"optim": "rmsprop", "optim_args": "momentum"},
            "optim_args='momentum' must be NAME=VALUE, divided by commas",
        ),
        ({"optim": "rmsprop", "optim_args": "momentum=x"}, "optim=rmsprop: "),
        ({"optim_args": "a=1"}, "optim_args='a=1' has no effect with optim=adamw_torch"),
        ({"optim_args": "a=1", "adam_bias_correction": False}, "optim_args='a=1' has no effect"),
        ({"optim_target_modules": ["x"]}, "optim_target_modules=['x'] has no effect"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'?"),
        ({"report_to": ["nonsense"]}, "must be one of "),
        ({"report_to": "comet_ml"}, "report_to='comet_ml' needs the package comet-ml: pip install comet-ml"),
        ({"report_to": "flyte"}, "report_to='flyte': "),
        ({"torch_compile_backend": "nonsense"}, "torch_compile_backend=nonsense"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"x": 1}}}, "accelerator_config: "),
        ({"activation_checkpointing_kwargs": {"x": 1}}, "activation_checkpointing_kwargs='x' must be one of "),
        ({"learning_rate": 0.0}, "learning_rate=0.0 trains nothing"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 trains nothing"),
        ({"fp16": True, "use_cpu": True}, "fp16=True needs a GPU"),
    ],
)
def test_what_would_end_a_run_late_is_refused_at_once(make, options, said):
    with pytest.raises(InputError) as refused:
        check_training_options(make(**options))
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adafactor"},
        {"optim": "sgd", "max_steps": 5},
        {"optim": "rmsprop", "optim_args": "momentum=0.5"},
        {"adam_bias_correction": False, "decay_during_warmup": True},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 10},
        {"report_to": "all"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
)
def test_what_can_be_used_passes_and_leaves_nothing_behind(make, options):
    args, state = make(**options), torch.random.get_rng_state()
    before = args.to_dict()
    check_training_options(args)
    assert args.to_dict() == before and torch.equal(torch.random.get_rng_state(), state)


def test_the_options_of_adam_are_for_optimizers_that_take_them(make):
    """The list in the table, compared with what transformers makes of the options; others need packages."""
    ours = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}
    for optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        for name, value in ours.items():
            _, usual = Trainer.get_optimizer_cls_and_kwargs(make(optim=optim))
            _, changed = Trainer.get_optimizer_cls_and_kwargs(make(optim=optim, **{name: value}))
            given = make(optim=optim, **{name: value})
            if usual == changed:
                with pytest.raises(InputError, match=f"{name}={value} has no effect with optim='{optim}'"):
                    check_needs([given], [name])
            else:
                check_needs([given], [name])
