"""What a teacher with a tokenizer of its own reads of a student's batch.

`CollateAligned` gives the student's tokens the teacher's ids, where both tokenizers cut texts alike;
`CollateForTeacher` cuts the texts anew, for any other teacher. What is for the teacher has names that begin with
`FOR_TEACHER`.
"""

import re

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .batches import Batch, Collate, Row
from .text_blocks import Separators

FOR_TEACHER = "teacher_"
# Which of the teacher's tokens each of the student's is, `[batch, seq_len]`.
PLACES = "places"
# Models whose first token has the position behind that of padding.
OFFSET_POSITIONS = ("mpnet", "roberta", "xlm-roberta", "camembert")
SPECIAL_TOKENS = ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token")
SPECIAL = re.compile(r"[<\[].*[>\]]")
# Capitals, accents, signs and a rare word, which tokenizers treat differently.
SAMPLE = "The Tokenizers' pieces: déjà vu, 1,024 QUOKKAS (and e-mails)!"


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for, or `None` if it has none of its own."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    return positions


def collate_for_teacher(
    collate: Collate,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int | None = None,
    *,
    aligned: bool = False,
) -> Collate:
    """What makes the batches of a student and its teacher: `collate` itself if the teacher reads the student's inputs.

    Args:
        collate: makes the student's batch of rows.
        tokenizer, teacher_tokenizer: the student's and the teacher's.
        max_seq_length: length to which texts are truncated if they have to be cut anew for the teacher. `None` if rows
            come without their `"texts"`.
        aligned: whether each of the student's tokens has to be one of the teacher's, as losses on more than logits need
            it.

    Raises:
        ValueError: if the tokenizers do not cut texts alike, but must.
    """
    same_inputs = set(tokenizer.model_input_names) == set(teacher_tokenizer.model_input_names)
    same_ids = tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    if same_inputs and same_ids and cut_alike(tokenizer, teacher_tokenizer):
        return collate
    try:
        return CollateAligned(collate, tokenizer, teacher_tokenizer)
    except ValueError:
        if aligned or max_seq_length is None:
            raise
        return CollateForTeacher(collate, teacher_tokenizer, max_seq_length)


def cut_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give a text the same tokens, as far as a sample shows."""
    return tokenizer.tokenize(SAMPLE) == other.tokenize(SAMPLE)


class CollateAligned:
    """Makes a batch, and the teacher's of the same tokens.

    An MPNet has a BERT's tokens by other numbers, and one separator more between two texts.

    Args:
        collate: makes the student's batch.
        tokenizer: the student's.
        teacher_tokenizer: the teacher's.

    Raises:
        ValueError: if the two do not cut texts alike.
    """

    def __init__(
        self, collate: Collate, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        own, other = Separators(tokenizer), Separators(teacher_tokenizer)
        vocabulary = teacher_tokenizer.get_vocab()
        special = {getattr(tokenizer, name): getattr(teacher_tokenizer, name) for name in SPECIAL_TOKENS}
        numbers = {i: vocabulary.get(special.get(token, token)) for token, i in tokenizer.get_vocab().items()}
        lacking = sum(number is None for number in numbers.values())
        # Words that the teacher alone has would be cut up for it; what looks like a special token is in no text.
        more = vocabulary.keys() - tokenizer.get_vocab().keys()
        unknown = sum(not SPECIAL.fullmatch(token) for token in more)
        problems = {
            f"{lacking} of the student's tokens are none of the teacher's": lacking,
            f"{unknown} of the teacher's tokens are none of the student's": unknown,
            f"they cut {SAMPLE!r} differently": not cut_alike(tokenizer, teacher_tokenizer),
            "the teacher's puts fewer separators between two texts": other.between < own.between,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"the teacher's tokenizer must cut texts as the student's does, but {problem}")
        self.collate, self.sep_id, self.between = collate, own.sep_id, other.between - own.between
        self.teacher_sep_id, self.teacher_pad_id = other.sep_id, teacher_tokenizer.pad_token_id
        self.has_token_types = other.has_token_types
        self.number_of = torch.tensor([numbers.get(i, 0) for i in range(max(numbers) + 1)])

    def __call__(self, rows: list[Row]) -> Batch:
        batch = dict(self.collate(rows))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ends = ids == self.sep_id
        is_pair, first_end = ends.sum(1, keepdim=True) > 1, ends.long().argmax(1, keepdim=True)
        columns = torch.arange(ids.shape[1])
        second = is_pair & (columns > first_end)
        places = columns + self.between * second
        columns = torch.arange(int(places.max()) + 1)
        # The separators that the teacher alone has.
        more = is_pair & (columns > first_end) & (columns <= first_end + self.between)
        taught = ids.new_full(more.shape, self.teacher_pad_id).scatter(1, places, self.number_of[ids])
        taught = taught.masked_fill(more, self.teacher_sep_id)
        valid = mask.new_zeros(more.shape).scatter(1, places, mask).masked_fill(more, 1)
        own = {"input_ids": taught, "attention_mask": valid, PLACES: places}
        if self.has_token_types:
            own["token_type_ids"] = torch.zeros_like(taught).scatter(1, places, second.long()) * valid
        return {**batch, **{FOR_TEACHER + name: x for name, x in own.items()}}


class CollateForTeacher:
    """Makes a batch, and the teacher's of the same texts by its own tokenizer.

    Args:
        collate: makes the batch of rows without their `"texts"`.
        tokenizer: the teacher's.
        max_seq_length: longer inputs of the teacher are truncated.
    """

    def __init__(self, collate: Collate, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
        self.collate, self.tokenizer, self.max_seq_length = collate, tokenizer, max_seq_length

    def __call__(self, rows: list[Row]) -> Batch:
        inputs = self.tokenizer(
            [row["texts"] for row in rows],
            truncation=True,
            max_length=self.max_seq_length,
            padding=True,
            return_tensors="pt",
        )
        batch = self.collate([{name: x for name, x in row.items() if name != "texts"} for row in rows])
        return {**batch, **{FOR_TEACHER + name: x for name, x in inputs.items()}}
