"""What others' programs make of an export: transformers' tokenizer and pipeline, lm_eval.

make test-clients installs them and runs these; elsewhere a test is skipped where its client is
missing.
"""
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import HOME
from models import lively
from test_export import NASTY
from torch.nn import functional as F

import export
from support.tokenizer import Tokenizer

transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.clients, pytest.mark.gpt2]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """(our model of bytes, the folder of its export)"""
    model = lively(vocab_size=257, block_size=64)
    folder = str(tmp_path_factory.mktemp('clients') / 'hf')
    export.export(model, 'bytes', folder, 'float32')
    return model, folder


def test_auto_tokenizer_gives_bytes(exported):
    _, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer('bytes')
    assert len(theirs) == 257 and theirs.model_max_length == 64
    for text in NASTY:
        tokens = tokenizer.encode(text)
        assert theirs(text)['input_ids'] == tokens, text
        assert theirs.decode(tokens) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    assert theirs('the<|endoftext|>the')['input_ids'] == [*b'the', 256, *b'the']


def test_pipeline_continues_a_text_as_the_model_does(exported):
    model, folder = exported
    pipe = transformers.pipeline('text-generation', model=folder, device='cpu')
    text = 'Ein Käse, '
    said, = pipe(text, max_new_tokens=12, do_sample=False, return_tensors=True)
    tokens = list(text.encode())
    for _ in range(12):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] == 256:
            break
    assert said['generated_token_ids'] == tokens


TASK = """\
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{{{text}}}}'
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.skipif(not importlib.util.find_spec('lm_eval'), reason='lm_eval is not installed')
def test_lm_eval_measures_the_bits_a_byte_of_a_local_file(exported, tmp_path):
    model, folder = exported
    texts = ['Some text, é€.', 'two\n\nlines ', 'x' * 40]
    (tmp_path / 'text.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    (tmp_path / 'local.yaml').write_text(TASK.format(data=tmp_path / 'text.jsonl'))
    command = [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args',
               f'pretrained={folder},dtype=float32', '--tasks', 'local', '--include_path',
               str(tmp_path), '--device', 'cpu', '--output_path', str(tmp_path / 'out')]
    offline = dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_HOME=str(tmp_path / 'home'))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr
    results, = tmp_path.glob('out/**/results_*.json')
    measured = json.loads(results.read_text())['results']['local']['bits_per_byte,none']
    total = 0.0
    for text in texts:
        tokens = torch.tensor([256, *text.encode()])
        with torch.no_grad():
            logits = model(tokens[None, :-1])[0]
        total += F.cross_entropy(logits, tokens[1:], reduction='sum').item()
    expected = total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert measured == pytest.approx(expected, rel=1e-4)


TRACKERS = {  # client: a file that it leaves in the run directory
    'wandb': 'wandb/offline-run-*/*.wandb',
    'trackio': 'trackio/*',
    'tensorboard': 'tensorboard/events.out.tfevents.*',
}


@pytest.mark.parametrize('tracker', TRACKERS)
def test_tracker_takes_a_run_and_its_continuation(tracker, tiny, tmp_path):
    """In a process of its own, as wandb and trackio leave threads and servers behind."""
    if not importlib.util.find_spec(tracker):
        pytest.skip(f'{tracker} is not installed')
    environment = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    for more in (dict(max_iters=4), dict(max_iters=6, lr_decay_iters=4, init_from='resume')):
        command = [sys.executable, 'train.py', *tiny(tracker=tracker, **more)]
        done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 'WARNING' not in done.stdout
    assert list((tmp_path / 'run').glob(TRACKERS[tracker]))
    assert (tmp_path / 'run' / 'tracker_name').read_text().startswith('run-')
