"""Decoding of prompts and responses, so that the reward sees exactly the generated text.

Failure modes: prompt and response decoded separately, where tokenizers like Llama 2's lose the space between them; a
prompt that ends inside a character, which both sides see as U+FFFD; spaces that a decoder "cleans up".
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from plaudit.policy.samples import Samples
from plaudit.policy.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""The replacement character, which decoders write for incomplete characters."""


def tokens_in_front(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer adds before every text: a begin-of-text token, or none."""
    alone: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(alone) + 1):
        if alone and marked[start : start + len(alone)] == alone:
            return marked[:start]
    return []


def decode(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """Each row as text, with special tokens and without cleaning up spaces."""
    texts: list[str] = tokenizer.batch_decode([list(row) for row in rows], clean_up_tokenization_spaces=False)
    return texts


def cut_between_characters(
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    texts: Sequence[str],
    lengths: Sequence[int],
    *,
    at_least: int = 1,
) -> list[list[int]]:
    """The first `lengths[i]` tokens of each row, or fewer if the text would end inside a character.

    A row that would have fewer than `at_least` tokens is extended to the end of the character instead. `rows` are the
    tokens of the beginnings of `texts`.
    """
    cut = [list(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    decoded = decode(tokenizer, cut)
    for i, text in enumerate(decoded):
        if not _ends_broken(text, texts[i]):
            continue
        shorter = range(min(lengths[i], len(rows[i])) - 1, at_least - 1, -1)
        longer = range(lengths[i] + 1, len(rows[i]) + 1)
        for length in (*shorter, *longer):
            if not _ends_broken(decode(tokenizer, [rows[i][:length]])[0], texts[i]):
                cut[i] = list(rows[i][:length])
                break
    return cut


def _ends_broken(decoded: str, text: str) -> bool:
    # A text may contain the replacement character itself.
    return decoded.endswith(BROKEN) and not text.lstrip().startswith(decoded.lstrip())


def prompt_texts(tokenizer: Tokenizer, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """The prompts as the reward sees them: their full text without the begin-of-text token."""
    in_front = tokens_in_front(tokenizer)
    return decode(tokenizer, [_without(ids, in_front) for ids in token_ids])


def response_texts(tokenizer: Tokenizer, samples: Samples, ends: Sequence[int] = ()) -> list[str]:
    """The responses without special tokens, such that prompt text + response text is the decoded whole.

    `ends` are further end tokens to remove, even if the tokenizer does not mark them as special.
    """
    in_front, special = tokens_in_front(tokenizer), special_tokens(tokenizer) | set(ends)
    query_lengths, response_lengths = samples.lengths.tolist()
    queries = [
        _without(row[len(row) - length :], in_front)
        for row, length in zip(samples.query_ids.tolist(), query_lengths, strict=True)
    ]
    answers = [
        [token for token in row[:length] if token not in special]
        for row, length in zip(samples.response_ids.tolist(), response_lengths, strict=True)
    ]
    prompts = decode(tokenizer, queries)
    wholes = decode(tokenizer, [[*query, *answer] for query, answer in zip(queries, answers, strict=True)])
    return [
        behind(prompt, whole) if answer else "" for prompt, whole, answer in zip(prompts, wholes, answers, strict=True)
    ]


def behind(prompt: str, whole: str) -> str:
    """`whole` without its beginning `prompt`. If decoding changed the end of the prompt, the text from there on."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return whole[next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole)) :]


def special_tokens(tokenizer: Tokenizer) -> set[int]:
    """Tokens that are not text: they begin, end or pad a text."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """All end tokens: the tokenizer's and those in the model's generation settings."""
    settings = getattr(model, "generation_config", None) or model.config
    named = getattr(settings, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _without(ids: Sequence[int], in_front: Sequence[int]) -> list[int]:
    return list(ids[len(in_front) :] if in_front and list(ids[: len(in_front)]) == list(in_front) else ids)
