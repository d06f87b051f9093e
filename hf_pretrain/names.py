"""What others call the methods, recipes and options of this library, and where a name leads that is not ours.

Nothing heavy is imported here: the command line answers a mistyped name at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from importlib.resources import files
from pathlib import Path

from hf_pretrain.errors import nearest

# The help of methods and commands, as `make docs` writes it.
HELP = Path(__file__).parent / "help"
_ENCODERS_ONLY = "is no method here: this library pre-trains encoders, decoders and encoder-decoders"
_TRANSLATION = "is trained on translations, which is no method here; its architecture is"
MODELS = {
    "albert": "ALBERT is `hf-pretrain albert`",
    "bert": "BERT is `hf-pretrain bert`",
    "camembert": "CamemBERT is a RoBERTa: `hf-pretrain roberta`",
    "deberta": "DeBERTa-v3 is `hf-pretrain rtd --config deberta_v3_small`",
    "debertav2": "DeBERTa-v2 is `hf-pretrain mlm --model_type deberta-v2`",
    "distilbert": "DistilBERT is `hf-pretrain distil --config distilbert`",
    "distilroberta": "DistilRoBERTa is `hf-pretrain distil --config distilbert --teacher_name_or_path FacebookAI/roberta-base`",
    "electra": "ELECTRA is `hf-pretrain rtd --config electra_small`, or `hf-pretrain rtd --config electra_base`",
    "minilm": "MiniLM is `hf-pretrain distil --config minilmv2`",
    "mlmtlm": "MLM with TLM is `hf-pretrain xlm`",
    "modernbert": "ModernBERT is `hf-pretrain mlm --model_type modernbert`",
    "mobilebert": "MobileBERT is no recipe here; any student is made with `hf-pretrain distil`",
    "mpnet": "MPNet's objective is no method here; its architecture is `hf-pretrain mlm --model_type mpnet`",
    "mbert": "multilingual BERT is `hf-pretrain bert`, with --language_file",
    "neobert": f"NeoBERT {_ENCODERS_ONLY} that transformers has; any encoder of it is `hf-pretrain mlm --model_type ...`",
    "roformer": "RoFormer is `hf-pretrain mlm --model_type roformer`",
    "longformer": "Longformer is `hf-pretrain mlm --model_type longformer`",
    "bigbird": "BigBird is `hf-pretrain mlm --model_type big_bird`",
    "ernie": "ERNIE's masking of phrases is `hf-pretrain mlm --masking_unit ngram`",
    "roberta": "RoBERTa is `hf-pretrain roberta`",
    "spanbert": "SpanBERT is `hf-pretrain spanbert`",
    "structbert": "StructBERT is `hf-pretrain structbert`",
    "tinybert": "TinyBERT is `hf-pretrain distil --config tinybert_general`, and then `hf-pretrain distil-task --config "
    "tinybert_intermediate` and `hf-pretrain distil-task --config tinybert_prediction`",
    "transformerxl": "Transformer-XL is `hf-pretrain recurrent-lm --config transformer_xl_wt103`",
    "unilm": "UniLM is `hf-pretrain unilm`",
    "gptbert": "GPT-BERT is `hf-pretrain gpt_bert`",
    "mntp": "masked next-token prediction is `hf-pretrain encoder --prediction shifted`",
    "wholewordmasking": "whole-word masking is `hf-pretrain mlm --masking_unit word`",
    "xlm": "XLM is `hf-pretrain xlm`",
    "xlmroberta": "XLM-RoBERTa is `hf-pretrain roberta`, with --language_file",
    "xlmr": "XLM-RoBERTa is `hf-pretrain roberta`, with --language_file",
    "xlnet": "XLNet is `hf-pretrain plm --config xlnet_base`",
    # Encoder-decoders.
    "bart": "BART is `hf-pretrain bart`",
    "flant5": "FLAN-T5 is a T5 that was fine-tuned on tasks; its pre-training is `hf-pretrain t5`",
    "flanul2": "FLAN-UL2 is a UL2 that was fine-tuned on tasks; its pre-training is `hf-pretrain ul2`",
    "longt5": "LongT5's gap sentences are no objective here; its architecture is `hf-pretrain denoise --model_type longt5`",
    "marian": f"Marian {_TRANSLATION} `hf-pretrain denoise --model_type marian`",
    "mass": "MASS is `hf-pretrain mass`",
    "mbart": "mBART is `hf-pretrain bart --model_type mbart`, without its tokens for languages",
    "mt5": "mT5 is `hf-pretrain t5 --model_type mt5`",
    "opusmt": f"OPUS-MT {_TRANSLATION} `hf-pretrain denoise --model_type marian`",
    "pegasus": "Pegasus' gap sentences are no objective here; its architecture is `hf-pretrain denoise --model_type pegasus`",
    "t5": "T5 is `hf-pretrain t5`",
    "t5gemma": "T5Gemma is `hf-pretrain denoise --model_type t5gemma`",
    "ul2": "UL2 is `hf-pretrain ul2`",
    "umt5": "umT5 is `hf-pretrain t5 --model_type umt5`",
    # Tasks by other names.
    "maskedlm": "masked language modelling is `hf-pretrain mlm`",
    "causallm": "causal language modelling is `hf-pretrain clm`",
    "languagemodeling": "left-to-right language modelling is `hf-pretrain clm`, and masked language modelling `hf-pretrain mlm`",
    "runclm": "run_clm.py's task is `hf-pretrain clm`",
    "runmlm": "run_mlm.py's task is `hf-pretrain mlm`",
    "nsp": "next-sentence prediction is `hf-pretrain encoder --objectives mlm nsp`",
    "sop": "the order of sentences is `hf-pretrain encoder --objectives mlm sop`",
    "tlm": "translation language modelling is `hf-pretrain xlm`",
    "denoising": "denoising from sequence to sequence is `hf-pretrain denoise`",
    "encoderdecoder": "an encoder-decoder is pre-trained by `hf-pretrain denoise`",
    "prefixlm": "prefix language modelling is `hf-pretrain prefix_lm`",
    "seq2seq": "denoising from sequence to sequence is `hf-pretrain denoise`",
    "spancorruption": "span corruption is `hf-pretrain t5`",
    "textinfilling": "text infilling is `hf-pretrain bart`",
    "tsdae": "TSDAE is `hf-pretrain tsdae`",
    "sbo": "the span-boundary objective is `hf-pretrain spanbert`",
    "distill": "distillation is `hf-pretrain distil`, and on the examples of a task `hf-pretrain distil-task`",
    "distillation": "distillation is `hf-pretrain distil`, and on the examples of a task `hf-pretrain distil-task`",
    "dedup": "near-duplicates are left out by `hf-pretrain deduplicate`",
    "stats": "lengths of a corpus are shown by `hf-pretrain statistics`",
    # Left-to-right language models.
    "gpt": "GPT-1 is `hf-pretrain clm --config gpt1`, and its architecture `hf-pretrain clm --model_type openai-gpt`",
    "gpt1": "GPT-1 is `hf-pretrain clm --config gpt1`",
    "openaigpt": "GPT-1 is `hf-pretrain clm --config gpt1`",
    "gpt2": "GPT-2 is `hf-pretrain clm --config gpt2_small`, and its architecture with any sizes `hf-pretrain clm`",
    "llm": "a left-to-right language model is `hf-pretrain clm`",
    **{
        re.sub(r"\W", "", title).lower(): f"{title}'s architecture is `hf-pretrain clm --model_type {model_type}`"
        for title, model_type in {
            "BLOOM": "bloom",
            "Falcon": "falcon",
            "Gemma": "gemma",
            "GPT-J": "gptj",
            "GPT-Neo": "gpt_neo",
            "GPT-NeoX": "gpt_neox",
            "LLaMA": "llama",
            "Mamba": "mamba",
            "Mistral": "mistral",
            "OPT": "opt",
            "Phi": "phi",
            "Qwen": "qwen2",
            "SmolLM": "llama",
        }.items()
    },
    # Vectors of words.
    "bagofwords": "counts of words are `hf-pretrain vectors --method counts`",
    "cbow": "CBOW is `hf-pretrain vectors --method cbow`",
    "fasttext": "fastText's letter n-grams are no method here; `hf-pretrain vectors --method import` reads its .vec files",
    "focus": "FOCUS is `transfer_vocabulary` in Python, with `hf-pretrain vectors --tokenizer_name`",
    "glove": "GloVe is `hf-pretrain vectors --method glove`",
    "lsa": "latent semantic analysis is `hf-pretrain vectors --method lsa`",
    "model2vec": "vectors of an encoder's tokens are `hf-pretrain vectors --method distil`",
    "onehot": "one-hot words are `hf-pretrain vectors --method onehot`",
    "ppmi": "PPMI is `hf-pretrain vectors --method ppmi`",
    "skipgram": "skip-gram is `hf-pretrain vectors --method skipgram`",
    "tfidf": "TF-IDF is `hf-pretrain vectors --method tfidf`",
    "word2vec": "word2vec is `hf-pretrain vectors --method skipgram`, or `--method cbow`",
    "wordvectors": "vectors of words are made by `hf-pretrain vectors`",
    # One vector for a text.
    "ctl": "contrastive learning is `hf-pretrain contrastive`",
    "declutr": "DeCLUTR is `hf-pretrain contrastive --views spans --beside mlm`",
    "deepinfomax": "Deep InfoMax on text is `hf-pretrain infoword`",
    "dim": "Deep InfoMax on text is `hf-pretrain infoword`",
    "ict": "the inverse cloze task is `hf-pretrain ict`",
    "infonce": "InfoNCE is the loss of `hf-pretrain contrastive`",
    "infoword": "InfoWord is `hf-pretrain infoword`",
    "inverseclozetask": "the inverse cloze task is `hf-pretrain ict`",
    "retromae": "RetroMAE is `hf-pretrain retromae`",
    "sbert": "Sentence-BERT learns from labelled pairs, in sentence-transformers; from raw text it is `hf-pretrain simcse`",
    "sentenceembeddings": "vectors of texts are trained by `hf-pretrain contrastive`",
    "simcse": "SimCSE is `hf-pretrain simcse`",
    "clip": f"CLIP {_ENCODERS_ONLY} of text",
    "vit": f"ViT {_ENCODERS_ONLY} of text",
    "wav2vec2": f"wav2vec 2.0 {_ENCODERS_ONLY} of text",
}
"""Names of models and tasks, without case and separators, and where they lead."""

_OPTIONS = {
    # run_mlm.py and its kin, earlier versions of transformers, and everyday speech.
    "per_device_train_batch_size": "batch_size train_batch_size per_gpu_train_batch_size per_device_batch_size bs max_sentences",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size valid_batch_size batch_size_valid max_sentences_valid",
    "learning_rate": "lr peak_lr base_lr",
    "num_train_epochs": "epochs num_epochs max_epoch epoch n_epochs max_epochs",
    "max_steps": "steps num_train_steps num_steps max_train_steps max_update total_num_update max_updates training_steps "
    "total_steps",
    "max_minutes": "max_time stop_time_hours",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_updates warmup_proportion",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "optim": "optimizer optimiser",
    "optim adafactor": "adafactor",
    "adam_beta1": "adam_betas beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps eps epsilon",
    "weight_decay": "wd",
    "gradient_accumulation_steps": "grad_accum accumulation_steps update_freq grad_acc_steps grad_acc",
    "max_grad_norm": "gradient_clipping clip_norm grad_clip clip",
    "activation_checkpointing": "checkpoint_activations",
    "block_size|max_length|tgt_len": "max_seq_length max_sequence_length max_seq_len seq_length seq_len max_length "
    "context_length tokens_per_sample sequence_length max_len max_source_length input_length inputs_length",
    "max_position_embeddings": "max_positions max_source_positions max_target_positions",
    "document_separator line": "line_by_line",
    "block_mode": "sample_break_mode packing group_texts",
    "masking_unit word": "whole_word_mask whole_word_masking wwm mask_whole_words do_whole_word_mask",
    "masking_unit span": "span_masking mask_spans mask_multiple_length",
    "mlm_probability": "mlm_prob mask_prob mask_probability masking_probability masked_lm_prob mlm_rate mask_rate",
    "context_factor": "plm_probability",
    "infilling_probability|mlm_probability": "mask mask_ratio",
    "infilling_mean_length": "poisson_lambda",
    "sentence_permutation_probability": "permute_sentences permute_sentence_ratio",
    "rotation_probability": "rotate rotate_ratio",
    "noise_density": "mlm_probability corruption_rate",
    "mean_span_length": "mean_noise_span_length mean_noise_span_lengths",
    "fragment_share": "word_mass",
    "random_share": "random_token_prob random_replace_prob mask_random",
    "mask_share": "mask_replace_prob",
    "eval_strategy": "evaluation_strategy do_evaluation",
    "eval_steps": "validate_interval_updates eval_interval evaluation_steps eval_every",
    "validation_fraction": "validation_split_percentage val_split eval_fraction test_size",
    "train_file": "train_data_file data train_data corpus text_file input_file train_path train data_dir dataset_path",
    "dataset_name": "dataset",
    "dataset_config_name": "dataset_config",
    "dataset_split": "train_subset train_split split",
    "validation_file": "eval_data_file eval_file valid_file dev_file test_file eval_data",
    "validation_split": "valid_subset",
    "text_column": "text_column_name text_field dataset_text_field",
    "text_columns": "sentence_columns",
    "label_column": "label_column_name",
    "model_name_or_path": "model model_name finetune_from_model pretrained_model init_checkpoint checkpoint",
    "teacher_name_or_path": "teacher teacher_model teacher_name teacher_model_name_or_path",
    "tokenizer_name": "tokenizer tokenizer_name_or_path tokenizer_path vocab_file",
    "vocab_size": "vocabulary_size n_vocab",
    "lowercase": "do_lower_case uncased do_lowercase",
    "model_type": "arch architecture config_name model_arch",
    "attn_implementation": "attention_implementation use_flash_attention flash_attention",
    "model_dtype": "torch_dtype dtype",
    "num_hidden_layers": "num_layers n_layers layers encoder_layers n_layer",
    "num_decoder_layers": "decoder_layers n_dec_layers n_decoder_layers",
    "num_attention_heads": "num_heads n_heads heads encoder_attention_heads n_head",
    "hidden_size": "dim encoder_embed_dim d_model n_embd width",
    "intermediate_size": "encoder_ffn_embed_dim ffn_dim d_inner",
    "hidden_dropout_prob|config_overrides": "dropout pooler_dropout activation_dropout",
    "attention_probs_dropout_prob|config_overrides": "attention_dropout",
    "output_dir": "output save_dir out output_path",
    "overwrite_output_dir": "overwrite force",
    "resume_from_checkpoint": "resume restore_file resume_from resume_training",
    "save_steps": "checkpointing_steps save_interval_updates save_interval save_every",
    "save_total_limit": "keep_interval_updates keep_last_epochs keep_best_checkpoints",
    "logging_steps": "log_interval log_every logging_interval",
    "dataloader_num_workers": "num_workers",
    "preprocessing_num_workers": "num_proc workers dataset_num_proc",
    "use_cpu": "no_cuda no_gpu cpu",
    "fp16": "fp16_backend memory_efficient_fp16 fp16_opt_level",
    "bf16": "mixed_precision memory_efficient_bf16 amp",
    "torch_compile": "compile",
    "disable_tqdm": "no_progress_bar",
    "report_to": "wandb_project with_tracking tensorboard_logdir logger use_wandb wandb",
    "hub_token": "token use_auth_token",
    "hub_model_id": "push_to_hub_model_id hub_repo_id repo_id",
    "metric_for_best_model": "best_checkpoint_metric",
    "greater_is_better": "maximize_best_checkpoint_metric",
    "train_sampling_strategy": "group_by_length",
    "ddp_find_unused_parameters": "find_unused_parameters",
    "seed": "random_seed",
}
SYNONYMS = {synonym: option for option, synonyms in _OPTIONS.items() for synonym in synonyms.split()}
"""Names of options elsewhere, and ours: "a|b" is the first that a program has, and "a word" that option with that value."""

_CACHE = "set the environment variables HF_HOME and HF_DATASETS_CACHE"
_LENGTH = "batches hold --per_device_train_batch_size examples of at most --block_size tokens"
_MASKS = "what replaces a token is set by --mask_share and --random_share, and the rest is kept"
_MASK_LENGTH = "what BART does to a text is --noise_steps: infilling has one mask a span, token_masking one a word"
_PROCESSES = "start several processes with accelerate launch"
_SENTINELS = "a tokenizer that is trained here gets the sentinels that the noise needs"
WITHOUT_OPTION = {
    "cache_dir": _CACHE,
    "overwrite_cache": "a cache is found by its text and options, and HF_DATASETS_CACHE names its folder",
    "pad_to_max_length": "batches are padded to their longest example alone",
    "required_batch_size_multiple": "batches are padded to their longest example alone",
    "save_safetensors": "weights are always saved as safetensors",
    "use_fast_tokenizer": "tokenizers are always fast ones",
    "use_slow_tokenizer": "tokenizers are always fast ones",
    "low_cpu_mem_usage": "weights are always loaded without a second copy",
    "model_revision": "download the revision, and give its folder to --model_name_or_path",
    "revision": "download the revision, and give its folder to --model_name_or_path",
    "trust_remote_code": "models run the code of transformers and of this library alone",
    "train_ref_file": "give words of Chinese text with --word_segmenter jieba",
    "validation_ref_file": "give words of Chinese text with --word_segmenter jieba",
    "max_train_samples": "less text is --max_corpus_bytes, and a shorter training --max_steps",
    "max_eval_samples": "less held-out text is --max_eval_tokens, or --validation_fraction",
    "max_tokens": _LENGTH,
    "max_tokens_valid": _LENGTH,
    "mask_length": f"{_MASK_LENGTH}; masked spans of BERT are --masking_unit span",
    "replace_length": f"{_MASK_LENGTH}, and token_deletion none",
    "insert": "no random tokens are inserted: in BART's infilling, a span of no words inserts a mask",
    "permute": "no tokens are permuted: BART's sentences are, with --sentence_permutation_probability",
    "extra_ids": _SENTINELS,
    "num_sentinels": _SENTINELS,
    "max_target_length": "the longest target follows from --block_size and the noise",
    "targets_length": "the longest target follows from --block_size and the noise",
    "leave_unmasked_prob": _MASKS,
    "mask_stdev": _MASKS,
    "freq_weighted_replacement": "random tokens are all equally likely; how many there are is --random_share",
    "criterion": "the method is the first word, such as `hf-pretrain mlm`",
    "task_name": "the method is the first word, such as `hf-pretrain mlm`",
    "objective": "the method is the first word, such as `hf-pretrain mlm`",
    "mlm": "the method is the first word: `hf-pretrain mlm`",
    "do_mlm": "the method is the first word: `hf-pretrain mlm`",
    "dataset_impl": "text is read as it is, without preprocessing",
    "skip_invalid_size_inputs_valid_test": "documents that are too long are cut to --block_size",
    "shorten_method": "documents that are too long are cut to --block_size",
    "distributed_world_size": _PROCESSES,
    "distributed_port": _PROCESSES,
    "num_gpus": _PROCESSES,
    "gpus": _PROCESSES,
    "n_gpu": _PROCESSES,
    "devices": _PROCESSES,
    "user_dir": "a method of your own is an entry point of a package: see docs/adding_an_objective.md",
    "reset_optimizer": "weights alone are continued with --model_name_or_path",
    "reset_dataloader": "weights alone are continued with --model_name_or_path",
    "reset_lr_scheduler": "weights alone are continued with --model_name_or_path",
    "reset_meters": "weights alone are continued with --model_name_or_path",
    "patience": "early stopping is a callback of transformers, in Python",
    "early_stopping_patience": "early stopping is a callback of transformers, in Python",
    "end_learning_rate": 'the end of a schedule is set by --lr_scheduler_kwargs, such as {"lr_end": 1e-7}',
    "power": 'the power of a schedule is set by --lr_scheduler_kwargs, such as {"power": 2}',
    "no_save": "nothing is saved during training with --save_strategy no",
    "no_epoch_checkpoints": "nothing is saved during training with --save_strategy no",
    "no_last_checkpoints": "nothing is saved during training with --save_strategy no",
    "disable_validation": "nothing is evaluated during training with --eval_strategy no",
    "validate_interval": "evaluate each epoch with --eval_strategy epoch",
    "warmup_init_lr": "the warm-up begins at a rate of 0; its length is --warmup_steps",
    "log_format": "the table is for a terminal, and elsewhere there are plain lines",
    "log_file": "what is logged stands in trainer_state.json of --output_dir",
    "share_encoder_input_output_embed": "word table and head are tied as the architecture does; see --config_overrides",
    "model_parallel_size": "one model is divided over devices with --fsdp",
    "data_buffer_size": "batches are made ahead by --dataloader_num_workers",
    "fast_dev_run": "every program rehearses a step before it reads the text; a short run is --max_steps 2",
}
"""Options of other programs that have no counterpart here, and what to do instead."""


def model_hint(name: str) -> str | None:
    """Return where the name of a model or a task leads, such as "google/electra-base-discriminator"; None if nowhere."""
    words = re.findall(r"[a-z0-9.]+", name.rpartition("/")[2].lower())
    for count in range(len(words), 0, -1):
        joined = "".join(words[:count]).replace(".", "")
        for key in dict.fromkeys((joined, re.sub(r"(v?\d+)$", "", joined))):
            if key in MODELS:
                return MODELS[key]
    return None


def method_hint(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown method.

    Args:
        name: The unknown name.
        known: The names that the command line knows.
    """
    hint = model_hint(name)
    if hint is None:
        # A name that is near a model's must not lead to a method with a name that is less near.
        near = nearest(name.lower(), [*known, *MODELS], otherwise="").removeprefix("did you mean '").removesuffix("'?")
        hint = MODELS.get(near) if near not in known else f"did you mean {near!r}?"
    return hint or f"choose from {', '.join(known)}"


def option_hint(name: str, known: Collection[str], *, prog: str, dashes: str = "--") -> str:
    """Return the end of a message about an unknown option.

    Args:
        name: The unknown name, without dashes.
        known: Names of the options of the program.
        prog: How the program is called.
        dashes: What stands before an option where it is given.
    """
    if name in WITHOUT_OPTION:
        return WITHOUT_OPTION[name]
    option = name.removesuffix("_schedule")
    if option != name and option in known:
        return f"give the schedule to {dashes + option!r}, which takes a number or a schedule"
    owners = [path.stem for path in sorted(HELP.glob("*.txt")) if f"\n  --{name} " in path.read_text(encoding="utf-8")]
    choices = SYNONYMS.get(name, "").split("|")
    found = next((choice for choice in choices if choice.partition(" ")[0] in known), None)
    if found is not None:
        return f"did you mean {dashes + (found if dashes else found.replace(' ', ': '))!r}?"
    if owners:
        return f"it is an option of {', '.join(owners)}, and `{prog}` has none of that kind"
    if name in SYNONYMS:
        return f"elsewhere it is {dashes}{choices[0]}, which this program does not have: see `{prog} --help`"
    return nearest(dashes + name, [dashes + option for option in known], otherwise=f"see `{prog} --help`")


@cache
def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that come with the library, by name: those of methods, and in folders of their own those of commands."""
    folder = Path(str(files("hf_pretrain.trainers") / "recipes"))
    return {path.stem: path for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]}


@cache
def described_recipes() -> dict[str, tuple[str, str]]:
    """Return the method and the first sentence of every packaged recipe of a method, by name; its header has both."""
    found = {}
    for name, path in packaged_recipes().items():
        if path.parent.name != "recipes":
            continue
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        header: list[str] = []
        for line in rest:
            text = line.removeprefix("#").strip()
            if not line.startswith("#") or line.startswith("#   ") or (not text and header):
                break
            header.append(text)
        sentence = re.split(r"(?<=[.:])(?= |$)", " ".join(filter(None, header)))
        # A name before a colon, such as "BERT:", is only the beginning.
        text = sentence[0] if len(sentence[0]) > 40 or len(sentence) == 1 else sentence[0] + sentence[1]
        found[name] = (first.removeprefix("# hf-pretrain").strip(), text.rstrip(".:;"))
    return found


def cut(line: str, room: int) -> str:
    """Return the beginning of a line that fits into a number of characters, with dots where more follows."""
    return line if len(line) <= room else re.sub(r"[,;:]?\s+\S*$", "", line[: room - 3]) + " ..."
