"""The tokenizers: GPT-2's, and one of plain bytes."""
import os

from support.settings import Refused
from support.shards import EOT_TEXT, VOCABULARY


def gpt2_encoding():
    """tiktoken's GPT-2 encoding, fetched on first use and cached in TIKTOKEN_CACHE_DIR."""
    try:
        import tiktoken
        return tiktoken.get_encoding('gpt2')
    except (ImportError, OSError, ValueError) as error:
        cache = os.environ.get('TIKTOKEN_CACHE_DIR', '')
        raise Refused(
            f"tokenizer='gpt2': the vocabulary cannot be fetched ({type(error).__name__}) and is "
            f'not in TIKTOKEN_CACHE_DIR={cache!r}; where there is a network, pip install tiktoken '
            "and run tiktoken.get_encoding('gpt2'); copy its cache here and set TIKTOKEN_CACHE_DIR "
            'to it') from None


class Tokenizer:
    """Text to tokens and back, by the one called 'gpt2' or 'bytes'."""

    def __init__(self, name):
        if name not in VOCABULARY:
            raise Refused(f'tokenizer={name!r} is not one of {", ".join(VOCABULARY)}')
        self.eot = VOCABULARY[name] - 1  # ends each document
        self.encoding = gpt2_encoding() if name == 'gpt2' else None

    def encode(self, text):
        """List of tokens, without a final <|endoftext|>; a literal one is plain text."""
        if self.encoding is None:
            return list(text.encode())
        try:
            return self.encoding.encode(text, disallowed_special=())
        except ValueError as error:  # of white space that the regular expression cannot take
            raise Refused(f'a text of {len(text)} characters cannot be tokenized ({error}); '
                          'shorten its white space') from None

    def decode_bytes(self, tokens):
        """UTF-8; a character may be split between tokens."""
        if self.encoding is not None:
            return self.encoding.decode_bytes(list(tokens))
        return b''.join(EOT_TEXT.encode() if t == self.eot else bytes([t]) for t in tokens)

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors='replace')
