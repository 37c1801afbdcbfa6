"""Tokens as text, so that whoever judges reads what was written, and the policy reads what its tokenizer would give it.

What would be wrong here: prompt and response decoded apart, where a tokenizer of Llama-2's kind loses the space between
them; a prompt that ends inside a character, which both sides then see as U+FFFD; spaces that a decoder "cleans up".
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from plaudit.policy.samples import Samples
from plaudit.policy.tokenizer import Tokenizer

SHOWN_TOKENS = 64
"""As many tokens people are shown of a row."""
BROKEN = "\ufffd"
"""What decoders write for bytes that are no whole character."""


def tokens_in_front(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts in front of every text: a begin-of-text token, if it is one that does."""
    alone: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(alone) + 1):
        if alone and marked[start : start + len(alone)] == alone:
            return marked[:start]
    return []


def decode(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """Each row as text, special tokens included, exactly as it is: no space is cleaned up."""
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
    """The first `lengths[i]` tokens of each row, fewer where that would end inside a character, but for `at_least`.

    Where a row would have fewer than that, it gets the tokens that the character lacks instead. `rows` are the tokens
    of the beginnings of `texts`.
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
    # A text may hold the character itself.
    return decoded.endswith(BROKEN) and not text.lstrip().startswith(decoded.lstrip())


def prompt_texts(tokenizer: Tokenizer, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """What a judge reads of prompts: all of their text, but not the token that the tokenizer puts in front of each."""
    in_front = tokens_in_front(tokenizer)
    return decode(tokenizer, [_without(ids, in_front) for ids in token_ids])


def response_texts(tokenizer: Tokenizer, samples: Samples, ends: Sequence[int] = ()) -> list[str]:
    """The responses without special tokens, each as it reads behind its prompt: prompt and response make the whole.

    `ends` are tokens that are no text either, though the tokenizer does not call them special.
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
    """`whole` without the `prompt` it begins with; should a decoder change a prompt's end, from there on."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return whole[next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole)) :]


def named_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The tokens for people: each id with its token, at most `SHOWN_TOKENS` of them."""
    tokens = [f"{index}:{token!r}" for index, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]
    more = f" ... {len(ids) - SHOWN_TOKENS} more" if len(ids) > SHOWN_TOKENS else ""
    return " ".join(tokens[:SHOWN_TOKENS]) + more


def special_tokens(tokenizer: Tokenizer) -> set[int]:
    """Tokens that are no text: they end, begin or pad one."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends a text: the tokenizer's, and all that the model's generation settings name."""
    settings = getattr(model, "generation_config", None) or model.config
    named = getattr(settings, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _without(ids: Sequence[int], in_front: Sequence[int]) -> list[int]:
    return list(ids[len(in_front) :] if in_front and list(ids[: len(in_front)]) == list(in_front) else ids)
