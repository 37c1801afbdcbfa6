"""What this project asks of a tokenizer: a small part of transformers' `PreTrainedTokenizerBase`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class AddedToken(Protocol):
    """A token that was put into the vocabulary by name."""

    @property
    def special(self) -> bool:
        """Whether it is no text: it begins, ends or pads one."""


class Tokenizer(Protocol):
    """Text as token numbers, and back."""

    pad_token: str | None
    eos_token: str | None
    model_max_length: int
    """Tokens of the longest text; a huge number where there is no bound."""
    name_or_path: str
    chat_template: Any
    """Jinja text, or several by name; None for a tokenizer without one."""

    @property
    def pad_token_id(self) -> int:
        """`load_tokenizer` sees to it that there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """None for a tokenizer without an end-of-text token."""

    @property
    def all_special_ids(self) -> list[int]:
        """The numbers of the special tokens."""

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of the special tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by their number."""

    def __len__(self) -> int:
        """Tokens, added ones included."""

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """A mapping with `input_ids`: a list of numbers for one text, a list of such lists for several.

        The options are transformers' (`add_special_tokens`, `truncation`, `max_length`, …); with `return_tensors`, the
        values are tensors.
        """

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """A conversation as text (`tokenize=False`) or tokens."""

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """One row of tokens as text."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Each row of tokens as text."""

    def get_vocab(self) -> dict[str, int]:
        """The number of every token."""

    def get_added_vocab(self) -> dict[str, int]:
        """The number of every token that was added by name."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Writes the files from which it is loaded again."""
