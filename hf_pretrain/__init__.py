"""Pre-training objectives for transformers: every objective, any backbone, one Trainer.

`from hf_pretrain import ...` has every public name. A name is imported when it is first asked for, so that
``import hf_pretrain`` costs nothing. Architectures that have no stock class in transformers are registered with its Auto
classes: now if those are imported, or once they are.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_pretrain.registration import register_architectures

if TYPE_CHECKING:  # for editors and type checkers; a test compares these names with those below
    from hf_pretrain.commands.stages.running import StageResult as StageResult
    from hf_pretrain.commands.stages.running import run_stages as run_stages
    from hf_pretrain.corruption.arguments import MaskingArguments as MaskingArguments
    from hf_pretrain.data import draws as draws
    from hf_pretrain.data.arguments import DataArguments as DataArguments
    from hf_pretrain.data.arguments import MultilingualDataArguments as MultilingualDataArguments
    from hf_pretrain.data.documents.documents import tokenize_documents as tokenize_documents
    from hf_pretrain.data.documents.tokenizers import train_tokenizer as train_tokenizer
    from hf_pretrain.data.examples.epochs import EpochDataset as EpochDataset
    from hf_pretrain.data.examples.epochs import MixtureDataset as MixtureDataset
    from hf_pretrain.data.examples.packing import BlockDataset as BlockDataset
    from hf_pretrain.data.examples.sentence_pairs import SentencePairDataset as SentencePairDataset
    from hf_pretrain.data.examples.views import TextViewDataset as TextViewDataset
    from hf_pretrain.data.prepare import PreparedData as PreparedData
    from hf_pretrain.data.prepare import prepare_data as prepare_data
    from hf_pretrain.data.streaming.blocks import StreamingBlocks as StreamingBlocks
    from hf_pretrain.data.text.datasets import text_dataset as text_dataset
    from hf_pretrain.data.text.search import find_files as find_files
    from hf_pretrain.errors import InputError as InputError
    from hf_pretrain.errors import RunError as RunError
    from hf_pretrain.evaluation.detector import ReplacedTokenScorer as ReplacedTokenScorer
    from hf_pretrain.evaluation.harness import HarnessResults as HarnessResults
    from hf_pretrain.evaluation.harness import evaluate_lm as evaluate_lm
    from hf_pretrain.evaluation.harness import harness_model as harness_model
    from hf_pretrain.evaluation.likelihood import BidirectionalLM as BidirectionalLM
    from hf_pretrain.evaluation.likelihood import ClozeScore as ClozeScore
    from hf_pretrain.evaluation.likelihood import ContinuationScores as ContinuationScores
    from hf_pretrain.evaluation.likelihood import FewShotScore as FewShotScore
    from hf_pretrain.evaluation.likelihood import FewShotTask as FewShotTask
    from hf_pretrain.evaluation.likelihood import LikelihoodScorer as LikelihoodScorer
    from hf_pretrain.evaluation.likelihood import RollingPerplexity as RollingPerplexity
    from hf_pretrain.evaluation.likelihood import cloze_accuracy as cloze_accuracy
    from hf_pretrain.evaluation.likelihood import few_shot_accuracy as few_shot_accuracy
    from hf_pretrain.evaluation.likelihood import rolling_perplexity as rolling_perplexity
    from hf_pretrain.evaluation.likelihood import score_options as score_options
    from hf_pretrain.evaluation.minimal_pairs import MinimalPair as MinimalPair
    from hf_pretrain.evaluation.minimal_pairs import causal_log_likelihoods as causal_log_likelihoods
    from hf_pretrain.evaluation.minimal_pairs import denoising_log_likelihoods as denoising_log_likelihoods
    from hf_pretrain.evaluation.minimal_pairs import originality_scores as originality_scores
    from hf_pretrain.evaluation.minimal_pairs import pair_accuracy as pair_accuracy
    from hf_pretrain.evaluation.minimal_pairs import pseudo_log_likelihoods as pseudo_log_likelihoods
    from hf_pretrain.evaluation.minimal_pairs import read_minimal_pairs as read_minimal_pairs
    from hf_pretrain.evaluation.probes import encode as encode
    from hf_pretrain.evaluation.probes import probe_accuracy as probe_accuracy
    from hf_pretrain.evaluation.probes import probe_predictions as probe_predictions
    from hf_pretrain.evaluation.similarity import read_scored_pairs as read_scored_pairs
    from hf_pretrain.evaluation.similarity import retrieval_recall as retrieval_recall
    from hf_pretrain.evaluation.similarity import similarity_correlation as similarity_correlation
    from hf_pretrain.evaluation.similarity import text_vectors as text_vectors
    from hf_pretrain.evaluation.streams import sliding_window_evaluate as sliding_window_evaluate
    from hf_pretrain.evaluation.streams import stream_evaluate as stream_evaluate
    from hf_pretrain.evaluation.suite import EvaluatedModel as EvaluatedModel
    from hf_pretrain.evaluation.suite import LoadedTask as LoadedTask
    from hf_pretrain.evaluation.suite import MeasureOptions as MeasureOptions
    from hf_pretrain.evaluation.suite import SuiteTask as SuiteTask
    from hf_pretrain.evaluation.suite import find_tasks as find_tasks
    from hf_pretrain.evaluation.suite import measure_task as measure_task
    from hf_pretrain.evaluation.words import analogy_accuracy as analogy_accuracy
    from hf_pretrain.evaluation.words import word_similarity as word_similarity
    from hf_pretrain.hub.card import add_evaluation as add_evaluation
    from hf_pretrain.hub.evaluation import Evaluation as Evaluation
    from hf_pretrain.hub.record import ObjectiveDescription as ObjectiveDescription
    from hf_pretrain.modeling.base import PretrainingModel as PretrainingModel
    from hf_pretrain.modeling.configuration import ModelArguments as ModelArguments
    from hf_pretrain.modeling.losses import ExampleSum as ExampleSum
    from hf_pretrain.modeling.losses import PretrainingOutput as PretrainingOutput
    from hf_pretrain.modeling.pooling import SentenceModules as SentenceModules
    from hf_pretrain.modeling.surgery.cutting import cut_student as cut_student
    from hf_pretrain.modeling.surgery.directions import to_decoder as to_decoder
    from hf_pretrain.modeling.surgery.directions import to_encoder as to_encoder
    from hf_pretrain.modeling.surgery.vocabulary import trim_vocabulary as trim_vocabulary
    from hf_pretrain.models.elmo.configuration_elmo import ElmoConfig as ElmoConfig
    from hf_pretrain.models.elmo.conversion import load_elmo_weights as load_elmo_weights
    from hf_pretrain.models.elmo.modeling_elmo import ElmoForPreTraining as ElmoForPreTraining
    from hf_pretrain.models.elmo.modeling_elmo import (
        ElmoForSequenceClassification as ElmoForSequenceClassification,
    )
    from hf_pretrain.models.elmo.modeling_elmo import ElmoForTokenClassification as ElmoForTokenClassification
    from hf_pretrain.models.elmo.modeling_elmo import ElmoModel as ElmoModel
    from hf_pretrain.models.elmo.scalar_mix import ScalarMix as ScalarMix
    from hf_pretrain.models.elmo.tokenization_elmo import ElmoTokenizer as ElmoTokenizer
    from hf_pretrain.models.sparse_text.configuration_sparse_text import SparseTextConfig as SparseTextConfig
    from hf_pretrain.models.sparse_text.modeling_sparse_text import SparseTextModel as SparseTextModel
    from hf_pretrain.models.static_embedding.configuration_static_embedding import (
        StaticEmbeddingConfig as StaticEmbeddingConfig,
    )
    from hf_pretrain.models.static_embedding.modeling_static_embedding import (
        StaticEmbeddingModel as StaticEmbeddingModel,
    )
    from hf_pretrain.models.task_heads.architectures_task_heads import Architecture as Architecture
    from hf_pretrain.models.task_heads.architectures_task_heads import architectures as architectures
    from hf_pretrain.models.task_heads.architectures_task_heads import register_architecture as register_architecture
    from hf_pretrain.models.task_heads.configuration_task_heads import TaskHeadConfig as TaskHeadConfig
    from hf_pretrain.models.task_heads.modeling_task_heads import (
        EncoderForSequenceClassification as EncoderForSequenceClassification,
    )
    from hf_pretrain.models.task_heads.modeling_task_heads import (
        EncoderForTokenClassification as EncoderForTokenClassification,
    )
    from hf_pretrain.models.transformer_xl.configuration_transformer_xl import (
        TransformerXLConfig as TransformerXLConfig,
    )
    from hf_pretrain.models.transformer_xl.conversion import load_transfo_xl_checkpoint as load_transfo_xl_checkpoint
    from hf_pretrain.models.transformer_xl.modeling_transformer_xl import (
        TransformerXLForCausalLM as TransformerXLForCausalLM,
    )
    from hf_pretrain.models.transformer_xl.modeling_transformer_xl import (
        TransformerXLForSequenceClassification as TransformerXLForSequenceClassification,
    )
    from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLModel as TransformerXLModel
    from hf_pretrain.objectives.causal_lm import CausalLMDataArguments as CausalLMDataArguments
    from hf_pretrain.objectives.causal_lm import CausalLMForPreTraining as CausalLMForPreTraining
    from hf_pretrain.objectives.causal_lm import CausalLMModelArguments as CausalLMModelArguments
    from hf_pretrain.objectives.causal_lm import CausalLMTrainer as CausalLMTrainer
    from hf_pretrain.objectives.causal_lm import CausalLMTrainingArguments as CausalLMTrainingArguments
    from hf_pretrain.objectives.causal_lm import DataCollatorForCausalLM as DataCollatorForCausalLM
    from hf_pretrain.objectives.contrastive import ContrastiveForPreTraining as ContrastiveForPreTraining
    from hf_pretrain.objectives.contrastive import ContrastiveModelArguments as ContrastiveModelArguments
    from hf_pretrain.objectives.contrastive import ContrastiveTrainer as ContrastiveTrainer
    from hf_pretrain.objectives.contrastive import ContrastiveTrainingArguments as ContrastiveTrainingArguments
    from hf_pretrain.objectives.contrastive import DataCollatorForContrastive as DataCollatorForContrastive
    from hf_pretrain.objectives.contrastive import GivenPairs as GivenPairs
    from hf_pretrain.objectives.contrastive import load_pairs as load_pairs
    from hf_pretrain.objectives.denoising import DataCollatorForDenoising as DataCollatorForDenoising
    from hf_pretrain.objectives.denoising import DenoisingForPreTraining as DenoisingForPreTraining
    from hf_pretrain.objectives.denoising import DenoisingModelArguments as DenoisingModelArguments
    from hf_pretrain.objectives.denoising import DenoisingTrainer as DenoisingTrainer
    from hf_pretrain.objectives.denoising import DenoisingTrainingArguments as DenoisingTrainingArguments
    from hf_pretrain.objectives.distillation import DataCollatorForDistillation as DataCollatorForDistillation
    from hf_pretrain.objectives.distillation import DistillationModel as DistillationModel
    from hf_pretrain.objectives.distillation import DistillationTrainer as DistillationTrainer
    from hf_pretrain.objectives.distillation import DistillationTrainingArguments as DistillationTrainingArguments
    from hf_pretrain.objectives.distillation import StudentArguments as StudentArguments
    from hf_pretrain.objectives.distillation import TaskDistillationTrainer as TaskDistillationTrainer
    from hf_pretrain.objectives.distillation import (
        TaskDistillationTrainingArguments as TaskDistillationTrainingArguments,
    )
    from hf_pretrain.objectives.distillation import Teacher as Teacher
    from hf_pretrain.objectives.distillation import compare as compare
    from hf_pretrain.objectives.electric import DataCollatorForElectric as DataCollatorForElectric
    from hf_pretrain.objectives.electric import ElectricForPreTraining as ElectricForPreTraining
    from hf_pretrain.objectives.electric import ElectricModelArguments as ElectricModelArguments
    from hf_pretrain.objectives.electric import ElectricTrainer as ElectricTrainer
    from hf_pretrain.objectives.electric import ElectricTrainingArguments as ElectricTrainingArguments
    from hf_pretrain.objectives.electric import TwoTowerClozeConfig as TwoTowerClozeConfig
    from hf_pretrain.objectives.electric import TwoTowerClozeModel as TwoTowerClozeModel
    from hf_pretrain.objectives.electric import score_texts as score_texts
    from hf_pretrain.objectives.elmo import BidirectionalLMForPreTraining as BidirectionalLMForPreTraining
    from hf_pretrain.objectives.elmo import DataCollatorForElmo as DataCollatorForElmo
    from hf_pretrain.objectives.elmo import ElmoDataArguments as ElmoDataArguments
    from hf_pretrain.objectives.elmo import ElmoModelArguments as ElmoModelArguments
    from hf_pretrain.objectives.elmo import ElmoTrainer as ElmoTrainer
    from hf_pretrain.objectives.elmo import ElmoTrainingArguments as ElmoTrainingArguments
    from hf_pretrain.objectives.encoder import DataCollatorForEncoder as DataCollatorForEncoder
    from hf_pretrain.objectives.encoder import EncoderTrainer as EncoderTrainer
    from hf_pretrain.objectives.encoder import EncoderTrainingArguments as EncoderTrainingArguments
    from hf_pretrain.objectives.encoder import MaskedLMTrainer as MaskedLMTrainer
    from hf_pretrain.objectives.encoder.generation import generate as generate
    from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining as EncoderForPreTraining
    from hf_pretrain.objectives.masking import DataCollatorForMaskedLM as DataCollatorForMaskedLM
    from hf_pretrain.objectives.masking import MaskedLMTrainingArguments as MaskedLMTrainingArguments
    from hf_pretrain.objectives.permutation_lm import DataCollatorForPermutationLM as DataCollatorForPermutationLM
    from hf_pretrain.objectives.permutation_lm import PermutationArguments as PermutationArguments
    from hf_pretrain.objectives.permutation_lm import PermutationLMForPreTraining as PermutationLMForPreTraining
    from hf_pretrain.objectives.permutation_lm import PermutationLMModelArguments as PermutationLMModelArguments
    from hf_pretrain.objectives.permutation_lm import PermutationLMTrainer as PermutationLMTrainer
    from hf_pretrain.objectives.permutation_lm import PermutationLMTrainingArguments as PermutationLMTrainingArguments
    from hf_pretrain.objectives.permutation_lm import log_likelihood as log_likelihood
    from hf_pretrain.objectives.permutation_lm import score_permutations as score_permutations
    from hf_pretrain.objectives.recurrent_lm import DataCollatorForRecurrentLM as DataCollatorForRecurrentLM
    from hf_pretrain.objectives.recurrent_lm import RecurrentLMForPreTraining as RecurrentLMForPreTraining
    from hf_pretrain.objectives.recurrent_lm import RecurrentLMTrainer as RecurrentLMTrainer
    from hf_pretrain.objectives.recurrent_lm import RecurrentLMTrainingArguments as RecurrentLMTrainingArguments
    from hf_pretrain.objectives.recurrent_lm import TransformerXLModelArguments as TransformerXLModelArguments
    from hf_pretrain.objectives.replaced_token_detection import (
        DataCollatorForReplacedTokenDetection as DataCollatorForReplacedTokenDetection,
    )
    from hf_pretrain.objectives.replaced_token_detection import (
        ReplacedTokenDetectionForPreTraining as ReplacedTokenDetectionForPreTraining,
    )
    from hf_pretrain.objectives.replaced_token_detection import (
        ReplacedTokenDetectionModelArguments as ReplacedTokenDetectionModelArguments,
    )
    from hf_pretrain.objectives.replaced_token_detection import (
        ReplacedTokenDetectionTrainer as ReplacedTokenDetectionTrainer,
    )
    from hf_pretrain.objectives.replaced_token_detection import (
        ReplacedTokenDetectionTrainingArguments as ReplacedTokenDetectionTrainingArguments,
    )
    from hf_pretrain.schedules import Schedule as Schedule
    from hf_pretrain.tasks.answers import Answer as Answer
    from hf_pretrain.tasks.answers import answer_questions as answer_questions
    from hf_pretrain.tasks.answers import best_null_threshold as best_null_threshold
    from hf_pretrain.tasks.batches import DataCollatorForTask as DataCollatorForTask
    from hf_pretrain.tasks.batches import DataCollatorForTaskHead as DataCollatorForTaskHead
    from hf_pretrain.tasks.batches import DataCollatorForTextPairs as DataCollatorForTextPairs
    from hf_pretrain.tasks.data import TaskDataArguments as TaskDataArguments
    from hf_pretrain.tasks.data import prepare_task as prepare_task
    from hf_pretrain.tasks.examples import encode_text_pairs as encode_text_pairs
    from hf_pretrain.tasks.labelled import TaskData as TaskData
    from hf_pretrain.tasks.metrics import as_evaluate_metric as as_evaluate_metric
    from hf_pretrain.tasks.spec import TaskSpec as TaskSpec
    from hf_pretrain.tasks.spec import load_task as load_task
    from hf_pretrain.tasks.spec import read_tasks as read_tasks
    from hf_pretrain.training.arguments import PretrainingArguments as PretrainingArguments
    from hf_pretrain.training.method import Learning as Learning
    from hf_pretrain.training.method import Method as Method
    from hf_pretrain.training.method import MethodHooks as MethodHooks
    from hf_pretrain.training.trainer import PretrainingTrainer as PretrainingTrainer
    from hf_pretrain.transfer.adaptation import add_words as add_words
    from hf_pretrain.transfer.adaptation import choose_words as choose_words
    from hf_pretrain.transfer.adapters import merge_for_export as merge_for_export
    from hf_pretrain.transfer.arguments import StrategyArguments as StrategyArguments
    from hf_pretrain.transfer.comparison import ComparisonArm as ComparisonArm
    from hf_pretrain.transfer.comparison import ComparisonSettings as ComparisonSettings
    from hf_pretrain.transfer.comparison import StrategyComparison as StrategyComparison
    from hf_pretrain.transfer.feature_heads import FeatureClassifier as FeatureClassifier
    from hf_pretrain.transfer.feature_heads import FeatureRegressor as FeatureRegressor
    from hf_pretrain.transfer.features import PretrainedFeatures as PretrainedFeatures
    from hf_pretrain.transfer.fine_tuning import FineTuningArguments as FineTuningArguments
    from hf_pretrain.transfer.fine_tuning import FineTuningTrainer as FineTuningTrainer
    from hf_pretrain.transfer.fine_tuning import layerwise_parameter_groups as layerwise_parameter_groups
    from hf_pretrain.transfer.generative.inputs import (
        DataCollatorForGenerativeTransfer as DataCollatorForGenerativeTransfer,
    )
    from hf_pretrain.transfer.generative.inputs import add_transfer_tokens as add_transfer_tokens
    from hf_pretrain.transfer.generative.inputs import transform_examples as transform_examples
    from hf_pretrain.transfer.generative.modeling import GenerativeTransferModel as GenerativeTransferModel
    from hf_pretrain.transfer.generative.trainer import GenerativeTransferArguments as GenerativeTransferArguments
    from hf_pretrain.transfer.generative.trainer import GenerativeTransferTrainer as GenerativeTransferTrainer
    from hf_pretrain.transfer.generative.trainer import transfer_metrics as transfer_metrics
    from hf_pretrain.transfer.layers import reinitialise_layers as reinitialise_layers
    from hf_pretrain.transfer.multitask.modeling import MultiTaskModel as MultiTaskModel
    from hf_pretrain.transfer.multitask.sampling import task_probabilities as task_probabilities
    from hf_pretrain.transfer.multitask.trainer import MultiTaskArguments as MultiTaskArguments
    from hf_pretrain.transfer.multitask.trainer import MultiTaskTrainer as MultiTaskTrainer
    from hf_pretrain.transfer.strategies import slanted_triangular as slanted_triangular
    from hf_pretrain.transfer.strategies import strategy_report as strategy_report
    from hf_pretrain.transfer.tuning.export import export_fine_tuned as export_fine_tuned
    from hf_pretrain.transfer.tuning.fine_tune import FineTuned as FineTuned
    from hf_pretrain.transfer.tuning.fine_tune import fine_tune as fine_tune
    from hf_pretrain.transfer.tuning.heads import open_for_task as open_for_task
    from hf_pretrain.vectors.corpus import WordCorpus as WordCorpus
    from hf_pretrain.vectors.distillation import distil_vectors as distil_vectors
    from hf_pretrain.vectors.folder import WordVectors as WordVectors
    from hf_pretrain.vectors.glove import train_glove as train_glove
    from hf_pretrain.vectors.text_vectors import LatentTextVectorizer as LatentTextVectorizer
    from hf_pretrain.vectors.text_vectors import SparseTextVectorizer as SparseTextVectorizer
    from hf_pretrain.vectors.transfer import transfer_vocabulary as transfer_vocabulary
    from hf_pretrain.vectors.word2vec.training import Word2VecOptions as Word2VecOptions
    from hf_pretrain.vectors.word2vec.training import train_word2vec as train_word2vec

# Module -> its public names.
_EXPORTS = {
    "commands.stages.running": ("StageResult", "run_stages"),
    "corruption.arguments": ("MaskingArguments",),
    "data": ("draws",),
    "data.arguments": ("DataArguments", "MultilingualDataArguments"),
    "data.documents.documents": ("tokenize_documents",),
    "data.documents.tokenizers": ("train_tokenizer",),
    "data.examples.epochs": ("EpochDataset", "MixtureDataset"),
    "data.examples.packing": ("BlockDataset",),
    "data.examples.sentence_pairs": ("SentencePairDataset",),
    "data.examples.views": ("TextViewDataset",),
    "data.prepare": ("PreparedData", "prepare_data"),
    "data.streaming.blocks": ("StreamingBlocks",),
    "data.text.datasets": ("text_dataset",),
    "data.text.search": ("find_files",),
    "errors": ("InputError", "RunError"),
    "evaluation.detector": ("ReplacedTokenScorer",),
    "evaluation.harness": ("HarnessResults", "evaluate_lm", "harness_model"),
    "evaluation.likelihood": (
        "BidirectionalLM",
        "ClozeScore",
        "ContinuationScores",
        "FewShotScore",
        "FewShotTask",
        "LikelihoodScorer",
        "RollingPerplexity",
        "cloze_accuracy",
        "few_shot_accuracy",
        "rolling_perplexity",
        "score_options",
    ),
    "evaluation.minimal_pairs": (
        "MinimalPair",
        "causal_log_likelihoods",
        "denoising_log_likelihoods",
        "originality_scores",
        "pair_accuracy",
        "pseudo_log_likelihoods",
        "read_minimal_pairs",
    ),
    "evaluation.probes": ("encode", "probe_accuracy", "probe_predictions"),
    "evaluation.similarity": ("read_scored_pairs", "retrieval_recall", "similarity_correlation", "text_vectors"),
    "evaluation.streams": ("sliding_window_evaluate", "stream_evaluate"),
    "evaluation.suite": (
        "EvaluatedModel",
        "LoadedTask",
        "MeasureOptions",
        "SuiteTask",
        "find_tasks",
        "measure_task",
    ),
    "evaluation.words": ("analogy_accuracy", "word_similarity"),
    "hub.card": ("add_evaluation",),
    "hub.evaluation": ("Evaluation",),
    "hub.record": ("ObjectiveDescription",),
    "modeling.base": ("PretrainingModel",),
    "modeling.configuration": ("ModelArguments",),
    "modeling.losses": ("ExampleSum", "PretrainingOutput"),
    "modeling.pooling": ("SentenceModules",),
    "modeling.surgery.cutting": ("cut_student",),
    "modeling.surgery.directions": ("to_decoder", "to_encoder"),
    "modeling.surgery.vocabulary": ("trim_vocabulary",),
    "models.elmo.configuration_elmo": ("ElmoConfig",),
    "models.elmo.conversion": ("load_elmo_weights",),
    "models.elmo.scalar_mix": ("ScalarMix",),
    "models.elmo.modeling_elmo": (
        "ElmoForPreTraining",
        "ElmoForSequenceClassification",
        "ElmoForTokenClassification",
        "ElmoModel",
    ),
    "models.elmo.tokenization_elmo": ("ElmoTokenizer",),
    "models.sparse_text.configuration_sparse_text": ("SparseTextConfig",),
    "models.sparse_text.modeling_sparse_text": ("SparseTextModel",),
    "models.static_embedding.configuration_static_embedding": ("StaticEmbeddingConfig",),
    "models.static_embedding.modeling_static_embedding": ("StaticEmbeddingModel",),
    "models.task_heads.architectures_task_heads": ("Architecture", "architectures", "register_architecture"),
    "models.task_heads.configuration_task_heads": ("TaskHeadConfig",),
    "models.task_heads.modeling_task_heads": ("EncoderForSequenceClassification", "EncoderForTokenClassification"),
    "models.transformer_xl.configuration_transformer_xl": ("TransformerXLConfig",),
    "models.transformer_xl.conversion": ("load_transfo_xl_checkpoint",),
    "models.transformer_xl.modeling_transformer_xl": (
        "TransformerXLForCausalLM",
        "TransformerXLForSequenceClassification",
        "TransformerXLModel",
    ),
    "objectives.causal_lm": (
        "CausalLMDataArguments",
        "CausalLMForPreTraining",
        "CausalLMModelArguments",
        "CausalLMTrainer",
        "CausalLMTrainingArguments",
        "DataCollatorForCausalLM",
    ),
    "objectives.contrastive": (
        "ContrastiveForPreTraining",
        "ContrastiveModelArguments",
        "ContrastiveTrainer",
        "ContrastiveTrainingArguments",
        "DataCollatorForContrastive",
        "GivenPairs",
        "load_pairs",
    ),
    "objectives.denoising": (
        "DataCollatorForDenoising",
        "DenoisingForPreTraining",
        "DenoisingModelArguments",
        "DenoisingTrainer",
        "DenoisingTrainingArguments",
    ),
    "objectives.distillation": (
        "DataCollatorForDistillation",
        "DistillationModel",
        "DistillationTrainer",
        "DistillationTrainingArguments",
        "StudentArguments",
        "TaskDistillationTrainer",
        "TaskDistillationTrainingArguments",
        "Teacher",
        "compare",
    ),
    "objectives.electric": (
        "DataCollatorForElectric",
        "ElectricForPreTraining",
        "ElectricModelArguments",
        "ElectricTrainer",
        "ElectricTrainingArguments",
        "TwoTowerClozeConfig",
        "TwoTowerClozeModel",
        "score_texts",
    ),
    "objectives.elmo": (
        "BidirectionalLMForPreTraining",
        "DataCollatorForElmo",
        "ElmoDataArguments",
        "ElmoModelArguments",
        "ElmoTrainer",
        "ElmoTrainingArguments",
    ),
    "objectives.encoder": ("DataCollatorForEncoder", "EncoderTrainer", "EncoderTrainingArguments", "MaskedLMTrainer"),
    "objectives.encoder.generation": ("generate",),
    "objectives.encoder.modeling": ("EncoderForPreTraining",),
    "objectives.masking": ("DataCollatorForMaskedLM", "MaskedLMTrainingArguments"),
    "objectives.permutation_lm": (
        "DataCollatorForPermutationLM",
        "PermutationArguments",
        "PermutationLMForPreTraining",
        "PermutationLMModelArguments",
        "PermutationLMTrainer",
        "PermutationLMTrainingArguments",
        "log_likelihood",
        "score_permutations",
    ),
    "objectives.recurrent_lm": (
        "DataCollatorForRecurrentLM",
        "RecurrentLMForPreTraining",
        "RecurrentLMTrainer",
        "RecurrentLMTrainingArguments",
        "TransformerXLModelArguments",
    ),
    "objectives.replaced_token_detection": (
        "DataCollatorForReplacedTokenDetection",
        "ReplacedTokenDetectionForPreTraining",
        "ReplacedTokenDetectionModelArguments",
        "ReplacedTokenDetectionTrainer",
        "ReplacedTokenDetectionTrainingArguments",
    ),
    "schedules": ("Schedule",),
    "tasks.answers": ("Answer", "answer_questions", "best_null_threshold"),
    "tasks.batches": ("DataCollatorForTask", "DataCollatorForTaskHead", "DataCollatorForTextPairs"),
    "tasks.examples": ("encode_text_pairs",),
    "tasks.data": ("TaskDataArguments", "prepare_task"),
    "tasks.labelled": ("TaskData",),
    "tasks.metrics": ("as_evaluate_metric",),
    "tasks.spec": ("TaskSpec", "load_task", "read_tasks"),
    "training.arguments": ("PretrainingArguments",),
    "training.method": ("Learning", "Method", "MethodHooks"),
    "training.trainer": ("PretrainingTrainer",),
    "transfer.feature_heads": ("FeatureClassifier", "FeatureRegressor"),
    "transfer.features": ("PretrainedFeatures",),
    "transfer.adapters": ("merge_for_export",),
    "transfer.arguments": ("StrategyArguments",),
    "transfer.adaptation": ("add_words", "choose_words"),
    "transfer.comparison": ("ComparisonArm", "ComparisonSettings", "StrategyComparison"),
    "transfer.fine_tuning": ("FineTuningArguments", "FineTuningTrainer", "layerwise_parameter_groups"),
    "transfer.generative.trainer": ("GenerativeTransferArguments", "GenerativeTransferTrainer", "transfer_metrics"),
    "transfer.generative.inputs": ("DataCollatorForGenerativeTransfer", "add_transfer_tokens", "transform_examples"),
    "transfer.generative.modeling": ("GenerativeTransferModel",),
    "transfer.layers": ("reinitialise_layers",),
    "transfer.multitask.modeling": ("MultiTaskModel",),
    "transfer.multitask.sampling": ("task_probabilities",),
    "transfer.multitask.trainer": ("MultiTaskArguments", "MultiTaskTrainer"),
    "transfer.strategies": ("slanted_triangular", "strategy_report"),
    "transfer.tuning.export": ("export_fine_tuned",),
    "transfer.tuning.fine_tune": ("FineTuned", "fine_tune"),
    "transfer.tuning.heads": ("open_for_task",),
    "vectors.corpus": ("WordCorpus",),
    "vectors.distillation": ("distil_vectors",),
    "vectors.folder": ("WordVectors",),
    "vectors.glove": ("train_glove",),
    "vectors.text_vectors": ("LatentTextVectorizer", "SparseTextVectorizer"),
    "vectors.transfer": ("transfer_vocabulary",),
    "vectors.word2vec.training": ("Word2VecOptions", "train_word2vec"),
}
_MODULES = {name: f"hf_pretrain.{module}" for module, names in _EXPORTS.items() for name in names}

# What users of other libraries write -> what it is called here.
_OTHER_NAMES = {
    "BartTrainer": "DenoisingTrainer",
    "BertTrainer": "MaskedLMTrainer",
    "CLMTrainer": "CausalLMTrainer",
    "ContrastiveConfig": "ContrastiveTrainingArguments",
    "DataCollatorForLanguageModeling": "DataCollatorForMaskedLM",
    "DataCollatorForRTD": "DataCollatorForReplacedTokenDetection",
    "DataCollatorForT5MLM": "DataCollatorForDenoising",
    "DistillationConfig": "DistillationTrainingArguments",
    "DistilTrainer": "DistillationTrainer",
    "ElectraTrainer": "ReplacedTokenDetectionTrainer",
    "ElectricConfig": "ElectricTrainingArguments",
    "GPT2Trainer": "CausalLMTrainer",
    "GPTTrainer": "CausalLMTrainer",
    "MLMTrainer": "MaskedLMTrainer",
    "MaskedLMConfig": "MaskedLMTrainingArguments",
    "PLMTrainer": "PermutationLMTrainer",
    "RTDConfig": "ReplacedTokenDetectionTrainingArguments",
    "RTDTrainer": "ReplacedTokenDetectionTrainer",
    "RTDTrainingArguments": "ReplacedTokenDetectionTrainingArguments",
    "SimCSETrainer": "ContrastiveTrainer",
    "T5Trainer": "DenoisingTrainer",
    "TransformerXLTrainer": "RecurrentLMTrainer",
    "XLNetTrainer": "PermutationLMTrainer",
    "build_model": "a Trainer, which builds it from model= and model_args=",
    "evaluate_blimp": "pair_accuracy(scores, read_minimal_pairs(folder))",
    "probe": "probe_accuracy",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-pretrain")
    if name in _OTHER_NAMES:
        # An AttributeError would reach `from hf_pretrain import ...` without its text.
        raise ImportError(f"hf_pretrain has no {name!r}: use {_OTHER_NAMES[name]}")
    if name not in _MODULES:
        raise AttributeError(f"module 'hf_pretrain' has no attribute {name!r}")
    module = import_module(_MODULES[name])
    value = getattr(module, name) if hasattr(module, name) else import_module(f"{_MODULES[name]}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, "__version__"])


register_architectures()
