"""
sample.py as a user runs it.
"""
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import saver
from conftest import CHARS
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer

QUICK = ('--max_new_tokens=20', '--num_samples=2', '--device=cpu', '--dtype=float32')

@pytest.fixture(scope='module')
def chars(tmp_path_factory):
    """ a random character model, and its checkpoint """
    torch.manual_seed(1)
    model = GPT(GPTConfig(16, len(CHARS), 2, 2, 16)).eval()
    for p in model.parameters():
        p.data *= 4 # so that the likeliest token is ahead
    path = tmp_path_factory.mktemp('chars') / 'ckpt.pt'
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': CharTokenizer(CHARS).state}, path)
    return model, path

def samples(result):
    """ the samples that were printed """
    assert result.out.endswith('---------------\n')
    return result.out.split('\n---------------\n')[:-1]

def greedy(model, prompt, n):
    tokenizer = CharTokenizer(CHARS)
    idx = torch.tensor([tokenizer.encode(prompt)])
    for _ in range(n):
        window = idx[:, -16:] if idx.size(1) <= 16 or _ == 0 else idx[:, -8:]
        idx = torch.cat([idx, model(window)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(idx[0].tolist())

def test_greedy_samples_equal_the_uncached_model_s(run, chars):
    model, path = chars
    result = samples(run('sample.py', f'--out_dir={path}', '--start=def', '--temperature=0', '--top_k=0',
                         '--max_new_tokens=13', '--num_samples=2', '--device=cpu', '--dtype=float32'))
    assert result == [greedy(model, 'def', 13)] * 2

@pytest.mark.parametrize('options', [
    ('--start=',), ('--start=a=b',), ('--top_k=0', '--top_p=0.5'), ('--top_k=1000',),
    ('--start=' + 'long prompt ' * 5,), ('--dtype=bfloat16',)])
def test_each_option_gives_samples_of_the_length_that_was_asked_for(run, chars, options):
    result = run('sample.py', f'--out_dir={chars[1]}', *QUICK, *options)
    prompt = next((o[8:] for o in options if o.startswith('--start=')), '\n')
    found = samples(result)
    assert len(found) == 2
    assert all(text.startswith(prompt) and len(text) == len(prompt) + 20 for text in found)

def test_the_same_seed_gives_the_same_samples_streamed_or_not(run, chars):
    plain = run('sample.py', f'--out_dir={chars[1]}', *QUICK)
    streamed = run('sample.py', f'--out_dir={chars[1]}', *QUICK, '--stream=True')
    other = run('sample.py', f'--out_dir={chars[1]}', *QUICK, '--seed=1')
    assert plain.out == streamed.out != other.out and samples(plain)[0] != samples(plain)[1]

@pytest.mark.parametrize('stream', [True, False])
def test_a_sample_ends_before_the_stop_text(run, chars, stream):
    whole = samples(run('sample.py', f'--out_dir={chars[1]}', *QUICK, '--start=x'))[0][1:]
    stop = whole[5:8]
    cut = samples(run('sample.py', f'--out_dir={chars[1]}', *QUICK, '--start=x', f'--stop={stop}',
                      f'--stream={stream}'))
    assert cut[0] == 'x' + whole[:whole.index(stop)]

def test_the_prompt_may_come_from_a_file(run, chars, tmp_path):
    (tmp_path / 'prompt.txt').write_text('def f(x):\n', encoding='utf-8')
    result = run('sample.py', f'--out_dir={chars[1]}', *QUICK, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert all(text.startswith('def f(x):\n') for text in samples(result))

def test_a_model_from_hugging_face_samples_and_ends_at_end_of_text(run, hf_dir, tmp_path):
    result = run('sample.py', f'--init_from={hf_dir}', *QUICK, '--start=Hello')
    assert all(text.startswith('Hello') for text in samples(result))
    model = GPT.from_pretrained(str(hf_dir))
    with torch.no_grad(): # any token is followed by end-of-text
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[BPETokenizer.eot] * 1e5)
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': {'name': 'gpt2'}}, tmp_path / 'ends.pt')
    result = run('sample.py', f"--out_dir={tmp_path / 'ends.pt'}", *QUICK, '--start=Hello')
    assert samples(result) == ['Hello', 'Hello'] and '2 x 1 tokens' in result.err

def test_streaming_never_splits_a_character(run, hf_dir, tmp_path):
    """ a model that writes one emoji, which is several tokens of GPT-2's, again and again """
    ids = BPETokenizer().encode('🙂')
    assert len(ids) > 1
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 50257, 1, 1, 64))
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.zero_() # a token's embedding alone decides what follows it
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.mul_(0.01)
        for one, after in zip(ids, ids[1:] + ids[:1]):
            model.transformer.wte.weight[one].zero_()
            model.transformer.wte.weight[one][ids.index(one)] = 1.0
        model.transformer.ln_f.bias.zero_()
    # the head is tied, so the shift from one token to the next is made in the last block's MLP
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight.fill_(1.0)
        for i in range(len(ids)):
            mlp.c_fc.weight[i, i] = 1.0
            mlp.c_proj.weight[(i + 1) % len(ids), i] = 10.0
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': {'name': 'gpt2'}}, tmp_path / 'emoji.pt')
    result = run('sample.py', f"--out_dir={tmp_path / 'emoji.pt'}", '--start=🙂', '--temperature=0',
                 '--stream=True', f'--max_new_tokens={3 * len(ids)}', '--num_samples=1', '--device=cpu',
                 '--dtype=float32')
    assert samples(result) == ['🙂' * 4]

@pytest.mark.parametrize('prefix, dataset', [('', 'chars'), ('_orig_mod.', 'chars'),
                                             ('module.', 'elsewhere')])
def test_a_nanogpt_checkpoint_samples_with_its_dataset_s_characters(
        run, clone, chars, tmp_path, prefix, dataset):
    model, _ = chars
    if dataset == 'elsewhere':
        shutil.copy(clone / 'data' / 'chars' / 'meta.pkl', tmp_path)
    else: # another program's
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'author': 'me'}))
    torch.save({'model': {prefix + k: v for k, v in model.state_dict().items()},
                'config': {'dataset': dataset}, 'model_args': model.config.__dict__, 'iter_num': 1,
                'best_val_loss': torch.tensor(1.0)}, tmp_path / 'n.pt')
    args = ('--start=def', '--temperature=0', '--max_new_tokens=13', '--num_samples=1', '--device=cpu',
            '--dtype=float32')
    assert samples(run('sample.py', f"--out_dir={tmp_path / 'n.pt'}", *args)) == [greedy(model, 'def', 13)]

def test_a_notebook_s_output_is_no_file(run, chars, tmp_path):
    (tmp_path / 'cell.py').write_text(
        "import sys as _sys\nclass _Cell:\n    def __init__(self, out):\n"
        "        self.write, self.flush = out.write, out.flush\n_sys.stdout = _Cell(_sys.stdout)\n")
    assert len(samples(run('sample.py', tmp_path / 'cell.py', f'--out_dir={chars[1]}', *QUICK))) == 2

def test_tokens_that_only_their_number_is_known_of_are_learned_sampled_and_scored(
        run, train, clone, tmp_path):
    data = clone / 'data' / 'moves' # as nanoGPT takes them: its train.py reads vocab_size alone
    data.mkdir()
    (np.arange(3000) * 7 % 90).astype('<u2').tofile(data / 'train.bin')
    (np.arange(500) * 7 % 90).astype('<u2').tofile(data / 'val.bin')
    (data / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 90}))
    result = train('--dataset=moves', '--max_iters=60', '--eval_interval=60', '--learning_rate=1e-2',
                   '--sample_interval=60')
    assert all(word.isdecimal()
               for word in (result.out_dir / 'samples.txt').read_text().splitlines()[1].split())
    out_dir = f'--out_dir={result.out_dir}'
    sampled, = samples(run('sample.py', out_dir, '--start=3 10', '--temperature=0', '--max_new_tokens=4',
                           '--num_samples=1'))
    assert sampled == '3 10 17 24 31 38'
    columns = run('evaluate.py', out_dir).out.splitlines()[1].split()
    assert columns[-3:] == ['tokens', 'nats/token', 'perplexity'] # bytes of which text?

def test_ids_beyond_the_tokenizer_s_are_never_drawn(run, tmp_path):
    """ nanoGPT pads its vocabulary to 50304 """
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50304, 1, 1, 8))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50257:] = 10.0 # by far the likeliest
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'config': {'dataset': 'openwebtext'}}, tmp_path / 'n.pt')
    assert len(samples(run('sample.py', f"--out_dir={tmp_path / 'n.pt'}", *QUICK))) == 2

@pytest.mark.skipif(sys.platform == 'win32', reason="Windows has no SIGINT to send")
@pytest.mark.parametrize('stream', [True, False])
def test_ctrl_c_prints_what_there_is(clone, chars, stream):
    command = [sys.executable, '-u', 'sample.py', f'--out_dir={chars[1]}', '--max_new_tokens=1000000',
               '--num_samples=2', '--device=cpu', f'--stream={stream}', '--start=def']
    with subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding='utf-8') as process:
        first = process.stdout.read(20) if stream else process.stderr.read(400) # of the progress bar
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and len(first) > 10 and 'Traceback' not in err
    texts = ((first if stream else '') + out).split('\n---------------\n')[:-1]
    assert len(texts) == 2 and all(text.startswith('def') and len(text) > 5 for text in texts)

@pytest.mark.parametrize('asked', ['', 'ascii'])
def test_a_file_of_samples_is_in_utf8_unless_another_encoding_is_asked_for(clone, tmp_path, asked):
    model, chars = GPT(GPTConfig(8, 2, 1, 1, 8)), {'name': 'char', 'chars': ['\u5c0f', '\u732b']}
    saver.save({'model': model.state_dict(), 'model_args': checkpoints.model_args(model), 'tokenizer': chars},
               str(tmp_path / 'ckpt.pt'))
    env = {**os.environ, 'PYTHONIOENCODING': asked,
           'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'} # not UTF-8
    if not asked:
        del env['PYTHONIOENCODING']
    (tmp_path / 'prompt.txt').write_text('\u5c0f', encoding='utf-8')
    command = [sys.executable, 'sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--device=cpu',
               f"--start=FILE:{tmp_path / 'prompt.txt'}", '--max_new_tokens=5']
    done = subprocess.run(command, cwd=clone, capture_output=True, env=env)
    assert not done.returncode, done.stderr
    printed = done.stdout.decode(asked or 'utf-8').splitlines()[-2]
    assert len(printed) == 6 and set(printed) <= set('?' if asked else '\u5c0f\u732b')

def test_what_a_question_is_about_reaches_the_model(run, tmp_path):
    template = 'Q: {instruction}\n\nAbout: {input}\n\nA: '
    model = GPT(GPTConfig(64, 50257, 1, 1, 8))
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': {'name': 'gpt2'}, 'template': template}, tmp_path / 'ckpt.pt')
    (tmp_path / 'spy.py').write_text(
        "import model\n_stream = model.GPT.stream\ndef _spy(self, idx, *args, **options):\n"
        "    print('read', idx[0].tolist())\n    return _stream(self, idx, *args, **options)\n"
        "model.GPT.stream = _spy\n")
    out = run('sample.py', tmp_path / 'spy.py', f"--out_dir={tmp_path / 'ckpt.pt'}", '--instruction=Sum up.',
              '--input=A long text.', '--num_samples=1', '--max_new_tokens=1', '--device=cpu').out
    asked = 'Q: Sum up.\n\nAbout: A long text.\n\nA: '
    assert out.splitlines()[0] == f'read {BPETokenizer().encode(asked)}'
    assert 'Sum up' not in out # only the answer is printed
