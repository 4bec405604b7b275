"""support/tokenizer.py: GPT-2's and bytes."""
import os

import pytest
from texts import command, refusal, use_small_gpt2

from support.tokenizer import Tokenizer


def test_bytes_tokenizer_round_trips():
    tokenizer = Tokenizer('bytes')
    assert tokenizer.eot == 256
    assert tokenizer.encode('aé') == [97, 195, 169]
    text = 'naïve 漢 <|endoftext|>'
    assert tokenizer.decode(tokenizer.encode(text) + [256]) == text + '<|endoftext|>'
    assert tokenizer.decode([195]) == '\ufffd'
    assert refusal(Tokenizer, 'gpt3') == "tokenizer='gpt3' is not one of gpt2, bytes"


def test_a_literal_end_of_text_is_text(monkeypatch):
    use_small_gpt2(monkeypatch)
    tokenizer = Tokenizer('gpt2')
    assert tokenizer.encode('the<|endoftext|>')[0] == 257
    assert 50256 not in tokenizer.encode('the<|endoftext|>')
    assert tokenizer.decode([257, 50256]) == 'the<|endoftext|>'


def test_a_million_spaces_are_refused(monkeypatch):
    use_small_gpt2(monkeypatch)
    tokenizer = Tokenizer('gpt2')
    message = refusal(tokenizer.encode, 'x' + ' ' * 3_000_000 + 'y')
    assert message.startswith('a text of 3000002 characters cannot be tokenized (Regex error')


@pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='the vocabulary is not at hand')
def test_real_gpt2():
    tokenizer = Tokenizer('gpt2')
    assert tokenizer.eot == 50256
    assert tokenizer.encode('Hello world') == [15496, 995]
    assert tokenizer.decode([15496, 995, 50256]) == 'Hello world<|endoftext|>'


def test_vocabulary_without_network(tmp_path):
    (tmp_path / 'a.txt').write_text('some text')
    child = command('text', f'--input={tmp_path}/a.txt', f'--data_dir={tmp_path}/out',
                    TIKTOKEN_CACHE_DIR=str(tmp_path / 'empty'),
                    HTTPS_PROXY='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    _, said = child.communicate(timeout=60)
    assert child.returncode == 2
    assert said.startswith("refused:\n  - tokenizer='gpt2': the vocabulary cannot be fetched")
    assert 'set TIKTOKEN_CACHE_DIR' in said
    assert len(said.strip().splitlines()) == 2
