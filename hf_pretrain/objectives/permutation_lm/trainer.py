"""Options, data and Trainer of permutation language modelling."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.windows import LaneStream, XLNetWindows
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.samples import print_guesses
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription
from hf_pretrain.objectives.permutation_lm.collator import DataCollatorForPermutationLM, PermutationArguments
from hf_pretrain.objectives.permutation_lm.modeling import PermutationLMForPreTraining, PermutationLMModelArguments
from hf_pretrain.objectives.permutation_lm.scoring import logits_at
from hf_pretrain.objectives.recurrence import RecurrentTrainer, describe_lanes
from hf_pretrain.options import option
from hf_pretrain.training.arguments import PretrainingArguments, global_batch_size
from hf_pretrain.training.method import Learning, Method


@dataclass
class PermutationLMTrainingArguments(PermutationArguments, PretrainingArguments):
    """Options of [`PermutationLMTrainer`]: those of the order, of the memory and of every pre-training.

    Source: Yang et al. 2019, appendix A.4; `model_utils.py` and `train.py` of the official code.
    """

    needs: ClassVar[dict[str, str]] = {"bidirectional": "mem_len", "eval_lanes": "mem_len"}

    mem_len: int = option(
        0,
        "Positions of earlier segments that XLNet remembers (officially 384 for segments of 512); the text is "
        "then read in lanes. 0: no memory, and each example stands alone.",
    )
    bidirectional: bool = option(False, "With a memory: read the text in half of the lanes from its end.")
    eval_lanes: int = option(
        8,
        "With a memory: parts of the held-out text that are read side by side, on all devices together; fewer of "
        "a short text. per_device_eval_batch_size is lowered to fit.",
    )
    adam_bias_correction: bool = option(False, "Adam's bias correction; the official optimizer has none.")
    adam_epsilon: float = option(1e-6, "Adam's epsilon.")

    def __post_init__(self) -> None:
        """Refuse options of a memory that do not go together."""
        if self.bidirectional and not self.mem_len:
            raise InputError(
                "bidirectional=True is an option of the memory, but mem_len=0: set mem_len or leave it out"
            )
        if self.mem_len and not self.halves:
            raise InputError(
                f"halves=False would let what is remembered of a segment see its end, and mem_len={self.mem_len}: "
                "leave halves out"
            )
        super().__post_init__()

    @property
    def permutation(self) -> PermutationArguments:
        """The options of the order alone, as the collator takes them."""
        names = [field.name for field in fields(PermutationArguments)]
        return PermutationArguments(**{name: getattr(self, name) for name in names})


def plm_inputs(data: PreparedData, args: PermutationLMTrainingArguments) -> dict[str, Any]:
    """Return the arguments that a [`PermutationLMTrainer`] takes from the data: examples, or windows of lanes for a memory.

    Raises:
        InputError: If examples hold isolated documents, or for a memory if the data is a stream or too little for the lanes.
    """
    if not args.mem_len:
        if data.isolates_documents:
            raise InputError(
                "block_mode='isolated_documents': an order of prediction goes over a whole example; choose another "
                "block_mode, such as 'doc_sentences'"
            )
        return data.trainer_inputs()
    if data.train_documents is None:
        raise InputError(
            f"mem_len={args.mem_len} needs stored text to cut into lanes, not tokens: leave streaming out"
        )
    ways = 2 if args.bidirectional else 1
    num_lanes = global_batch_size(args)
    if num_lanes % ways:
        raise InputError(
            f"bidirectional=True needs an even number of examples a step, not {num_lanes}: change "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    train = _windows(data, data.train_documents, args, num_lanes=num_lanes // ways)
    held_out = None
    if data.eval_documents is not None:
        held_out = _windows(data, data.eval_documents, args, num_lanes=_eval_lanes(data, args) // ways)
    return describe_lanes(data, train, held_out, unit="windows")


def _eval_lanes(data: PreparedData, args: PermutationLMTrainingArguments) -> int:
    """Return how many lanes the held-out text is read in: such that each has a window, and all processes have equally many."""
    whole = LaneStream(data.eval_documents, tokenizer=data.tokenizer, num_lanes=1)
    ways = 2 if args.bidirectional else 1
    unit = math.lcm(ways, args.world_size)
    most = min(args.eval_lanes, whole.num_tokens // data.block_size * ways)
    return max(unit, most // unit * unit)


def _windows(
    data: PreparedData, documents: Any, args: PermutationLMTrainingArguments, *, num_lanes: int
) -> XLNetWindows:
    return XLNetWindows(
        LaneStream(documents, tokenizer=data.tokenizer, num_lanes=num_lanes),
        tokenizer=data.tokenizer,
        window=data.block_size,
        reuse_len=args.reuse_len,
        bidirectional=args.bidirectional,
        seed=args.seed,
    )


class PermutationLMTrainer(RecurrentTrainer):
    """Trains a [`PermutationLMForPreTraining`], with or without a memory."""

    option_classes = (PermutationLMModelArguments, PermutationLMTrainingArguments)

    def build_model(
        self,
        options: PermutationLMModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> PermutationLMForPreTraining:
        """Return the model with its two streams, and its memory if there is one."""
        reuse_len = (data.block_size + 1) // 2 if args.reuse_len is None else args.reuse_len
        return PermutationLMForPreTraining.from_arguments(
            options, data.tokenizer, stock=stock, mem_len=args.mem_len, reuse_len=reuse_len
        )

    @property
    def attention(self) -> str | None:
        """Name of the attention backend of a step; XLNet's two streams have one of their own."""
        own = getattr(self.model.two_streams, "backend", None)
        return super().attention if own is None else str(own)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForPermutationLM:
        """Return the collator of orders."""
        return DataCollatorForPermutationLM(tokenizer, permutation=args.permutation, seed=args.seed)

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return blocks, or windows of lanes for a memory."""
        return plm_inputs(data, args)

    objective = ObjectiveDescription(
        name="plm",
        title="Permutation language modelling",
        description=(
            "An order of the tokens is drawn at random for each example, and tokens at its end are predicted one after the "
            "other, each from all tokens before it in that order, wherever they stand in the text. No token is masked in the "
            "input: a second stream of attention knows the position of what it predicts, but not its content. So the model "
            "uses context on both sides, and the predictions multiply to a probability of the text."
        ),
        formula=(
            r"\mathcal{L} = -\mathbb{E}_{z} \left[ \frac{1}{|z_{>c}|} \sum_{t > c} "
            r"\log p_\theta(x_{z_t} \mid x_{z_{<t}}) \right]"
        ),
        citations=(
            """\
@inproceedings{yang2019xlnet,
  title = {{XLNet}: Generalized Autoregressive Pretraining for Language Understanding},
  author = {Yang, Zhilin and Dai, Zihang and Yang, Yiming and Carbonell, Jaime and Salakhutdinov, Ruslan and Le, Quoc V.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}""",
        ),
        metrics=SHARED_METRICS
        | {
            "plm_loss": "How surprised the model is by a token, given those before it in the order, in nats; 0 is certainty.",
            "plm_perplexity": "As many tokens, all as likely, would leave the model as unsure; it depends on the tokenizer.",
            "plm_accuracy": "Share of the predicted tokens where the first guess is right.",
        },
        headline=("plm_loss", "plm_perplexity", "plm_accuracy"),
        usage="""\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModel.from_pretrained("{repo}")
inputs = tokenizer({sentence}, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state  # [1, length, width]: a vector for each token""",
    )


def print_candidates(trainer: PermutationLMTrainer, data: PreparedData) -> None:
    """Print held-out sentences and the likeliest tokens in one place of each, of which all others are seen."""

    def guess(ids: list[int], position: int) -> torch.Tensor:
        return logits_at(trainer.model.eval(), ids, position)

    title = "Held-out sentences without a token, and the likeliest ones in its place:"
    print_guesses(data, guess, seed=trainer.args.seed, title=title)


METHOD = Method(
    trainer=PermutationLMTrainer,
    description="""\
Pre-train a permutation language model: an XLNet, or another encoder that takes its positions as an input.

    hf-pretrain plm --train_file corpus.txt --output_dir my-xlnet
    hf-pretrain plm --model_type modernbert --train_file corpus.txt --output_dir my-modernbert
    accelerate launch trainers/plm.py --config trainers/recipes/xlnet_base.yaml --train_file corpus.txt --output_dir my-xlnet

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-xlnet")`.""",
    arguments=(DataArguments, PermutationLMModelArguments, PermutationLMTrainingArguments),
    learning=Learning(left={"plm_loss": 0.44}),
    demonstrate=print_candidates,
    tiny_options={"mem_len": 8},
)
