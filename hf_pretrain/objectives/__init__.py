"""Objectives: for each one its collator, losses, training arguments and Trainer.

A method of this library is a folder here and a row below. The command line, the shared tests, the tables of the docs, the pages
of `trainers/` and the names of `hf_pretrain` come from the row and from the `Method` record that it names.
"""

from hf_pretrain.training.method import Listed

METHODS = {
    "mlm": Listed(
        "masked language modelling: hide tokens, words or spans and find them again",
        "hf_pretrain.objectives.encoder:MASKED_LM",
        trainer="MaskedLMTrainer",
    ),
    "encoder": Listed(
        "masked language modelling with any other objectives of an encoder, in one mixture",
        "hf_pretrain.objectives.encoder:METHOD",
        trainer="EncoderTrainer",
    ),
    "rtd": Listed(
        "replaced token detection (ELECTRA): tell replaced tokens from original ones",
        "hf_pretrain.objectives.replaced_token_detection:METHOD",
        trainer="ReplacedTokenDetectionTrainer",
    ),
    "electric": Listed(
        "noise-contrastive estimation (Electric): score every token in its context",
        "hf_pretrain.objectives.electric:METHOD",
        trainer="ElectricTrainer",
    ),
    "plm": Listed(
        "permutation language modelling (XLNet): predict tokens in a random order",
        "hf_pretrain.objectives.permutation_lm:METHOD",
        trainer="PermutationLMTrainer",
    ),
    "clm": Listed(
        "causal language modelling (GPT): predict each token from those before it",
        "hf_pretrain.objectives.causal_lm:METHOD",
        trainer="CausalLMTrainer",
    ),
    "recurrent-lm": Listed(
        "language modelling with a memory of the text before (Transformer-XL)",
        "hf_pretrain.objectives.recurrent_lm:METHOD",
        trainer="RecurrentLMTrainer",
    ),
    "elmo": Listed(
        "language modelling in both directions over words made of characters (ELMo)",
        "hf_pretrain.objectives.elmo:METHOD",
        trainer="ElmoTrainer",
    ),
    "denoise": Listed(
        "sequence-to-sequence denoising (BART, T5, UL2, MASS): write what noise has taken out",
        "hf_pretrain.objectives.denoising:METHOD",
        trainer="DenoisingTrainer",
    ),
    "contrastive": Listed(
        "one vector for a text (SimCSE, ICT, InfoWord, RetroMAE, TSDAE), from raw text",
        "hf_pretrain.objectives.contrastive:METHOD",
        trainer="ContrastiveTrainer",
    ),
    "distil": Listed(
        "distillation of an encoder into a smaller one, on text (TinyBERT, DistilBERT, MiniLM)",
        "hf_pretrain.objectives.distillation:METHOD",
        trainer="DistillationTrainer",
    ),
    "distil-task": Listed(
        "distillation of a fine-tuned classifier, on the examples of its task (TinyBERT)",
        "hf_pretrain.objectives.distillation:TASK_METHOD",
        trainer="TaskDistillationTrainer",
    ),
}
"""The methods of this library by name; installed packages may register more."""
