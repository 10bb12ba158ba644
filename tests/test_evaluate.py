"""
evaluate.py as a user runs it, against the same figures made by hand from transformers' logits.
"""
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import CHARS, ROOT, TEXT
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer

BPE = BPETokenizer()
CPU = ('--device=cpu', '--dtype=float32', '--base=none')
STORY = 'The café was closed. 東京 is far, and so is the café — we walked on, 🙂 and on, and on.\n' * 2
LAMBADA = ['She put the the', 'one two one two one one',
           'He said:\n"No"  and  "No" ', 'a long story ' * 20 + 'story story']
LAST_WORDS = ' the', ' one', '  "No"', ' story'
HELLASWAG = [
    {'ind': 24, 'activity_label': 'Roof', 'ctx_a': 'A man is on a roof.', 'ctx_b': 'he',
     'ctx': 'A man is on a roof. he',
     'endings': ['roof roof.', 'is using wrap to wrap a pair of skis.', 'he he', 'holds a rubik’s cube.'],
     'label': 3},
    {'ctx': 'The dog ', 'endings': ['dog', 'runs', 'dog dog dog dog', 'sleeps all day long'], 'label': '2'},
    {'ctx_a': 'Boil water.', 'ctx_b': 'then', 'endings': ['go', 'add', 'salt', 'a'], 'label': 2},
    {'ctx': 'on and ' * 30, 'endings': ['on', 'on and on', 'off', 'and so it went on and on'], 'label': 1}]

@pytest.fixture(scope='module')
def theirs(hf_dir):
    """ the tiny GPT-2 as transformers computes it, made to expect the token again that it reads """
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(hf_dir).eval()
    model.transformer.wte.weight.data *= 30
    return model

@pytest.fixture(scope='module')
def bpe(theirs, hf_dir, tmp_path_factory):
    """ `theirs` as a checkpoint that was finetuned from hf_dir, with 32 positions """
    folder = tmp_path_factory.mktemp('bpe')
    theirs.save_pretrained(folder / 'hf')
    model = GPT.from_pretrained(str(folder / 'hf'))
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': {'name': 'gpt2'}, 'config': {'init_from': str(hf_dir), 'dataset': 'novel'}},
               folder / 'ckpt.pt')
    return folder

@pytest.fixture(scope='module')
def chars(tmp_path_factory):
    """ a random character model with 16 positions, and its checkpoint, of which the base is gone """
    torch.manual_seed(1)
    model = GPT(GPTConfig(16, len(CHARS), 2, 2, 16)).eval()
    path = tmp_path_factory.mktemp('chars') / 'ckpt.pt'
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': CharTokenizer(CHARS).state,
                'config': {'init_from': '/no/such/model', 'dataset': 'chars'}}, path)
    return model, path

def log_probs(model, ids):
    """ (len(ids) - 1, V): what follows each of the ids but the last, from transformers' model or ours """
    idx = torch.tensor([ids[:-1]])
    with torch.no_grad():
        logits = model.lm_head(model.hidden(idx)) if isinstance(model, GPT) else model(idx).logits
    return F.log_softmax(logits[0], dim=-1)

def sliding(model, ids, T, stride):
    """ the nats of every token but the first, each from the first window of T tokens that is followed by it
    or holds it; the windows start `stride` apart """
    nats = []
    for at in range(1, len(ids)):
        start = max(0, -(-(at - T) // stride)) * stride
        nats.append(-log_probs(model, ids[start:at + 1])[-1, ids[at]].item())
    return nats

@pytest.fixture
def evaluate(monkeypatch, capsys):
    """ evaluate.py in this process, which has torch already: (status, stdout, stderr) as its user gets
    them """
    def evaluate(*args):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', *map(str, args)])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook) # to be put back
        status = 0
        try:
            runpy.run_path(os.path.join(ROOT, 'evaluate.py'), run_name='__main__')
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            with pytest.raises(SystemExit) as end:
                sys.excepthook(*sys.exc_info())
            status = end.value.code
        return status, *capsys.readouterr()
    return evaluate

@pytest.fixture
def results(evaluate):
    """ the rows of its JSON """
    def results(*args):
        status, out, err = evaluate(*args, '--json=True')
        assert status == 0 and out.count('\n') == 1, err
        return json.loads(out)['results']
    return results

def test_perplexity_slides_a_window_over_every_token_and_the_base_stands_beside(run, theirs, bpe, hf_dir,
                                                                                tmp_path):
    from transformers import GPT2LMHeadModel
    (tmp_path / 'story.txt').write_text(STORY, encoding='utf-8')
    ids, n_bytes = BPE.encode(STORY), len(STORY.encode()) - len('The')
    out = run('evaluate.py', f'--out_dir={bpe}', f"--file={tmp_path / 'story.txt'}", *CPU, '--block_size=20',
              '--stride=7', '--batch_size=3', '--base=').out
    head, columns, *rows = out.splitlines()
    assert str(tmp_path / 'story.txt') in head and {len(line) for line in rows} == {len(columns)} # aligned
    assert columns.split()[3:] == ['tokens', 'bytes', 'nats/token', 'perplexity', 'bits/byte']
    by_hand = []
    untuned = GPT2LMHeadModel.from_pretrained(hf_dir).eval()
    for row, name, model in zip(rows, (bpe, hf_dir), (theirs, untuned)):
        nats = sliding(model, ids, 20, 7)
        assert row.split()[:5] == [str(name), '20', '7', str(len(ids) - 1), str(n_bytes)]
        by_hand.append([np.mean(nats), math.exp(np.mean(nats)), sum(nats) / math.log(2) / n_bytes])
        np.testing.assert_allclose(numbers(row.split()[5:]), by_hand[-1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(numbers(rows[2].split()[1:]), np.subtract(*by_hand), rtol=1e-5, atol=1e-4)

def test_a_stride_of_the_whole_window_gives_disjoint_windows(results, chars, tmp_path):
    model, path = chars
    text = TEXT[:1000]
    (tmp_path / 'code.txt').write_text(text, encoding='utf-8')
    result, = results(f'--out_dir={path}', *CPU, f"--file={tmp_path / 'code.txt'}", '--stride=16')
    ids, nats = torch.tensor(CharTokenizer(CHARS).encode(text)), 0.0
    with torch.no_grad():
        for i in range(0, 999, 16):
            y = ids[i + 1:i + 17]
            nats += model(ids[None, i:i + len(y)], y[None], scale=1.0)[1].item()
    assert (result['tokens'], result['context'], result['stride']) == (999, 16, 16)
    assert result['nats/token'] == pytest.approx(nats / 999, rel=1e-5)
    assert result['perplexity'] == pytest.approx(math.exp(nats / 999), rel=1e-5)
    assert result['bits/byte'] == pytest.approx(nats / math.log(2) / (len(text.encode()) - 1), rel=1e-5)

def test_a_base_that_is_gone_costs_one_line(evaluate, chars, tmp_path):
    (tmp_path / 'code.txt').write_text(TEXT[:50], encoding='utf-8')
    status, out, err = evaluate(f'--out_dir={chars[1]}', f"--file={tmp_path / 'code.txt'}", '--device=cpu')
    assert status == 0 and len(out.splitlines()) == 3
    assert (len(err.splitlines()) == 2
            and err.splitlines()[1].startswith('no comparison with its base: there is no model'))

def test_models_of_different_tokens_are_compared_by_bits_per_byte(results, chars, bpe, tmp_path):
    (tmp_path / 'code.txt').write_text(TEXT[:300], encoding='utf-8')
    ours, base, difference = results(f'--out_dir={chars[1]}', f"--file={tmp_path / 'code.txt'}", *CPU,
                                     f'--base={bpe}')
    assert (ours['tokens'], ours['context']) == (299, 16) and (base['context'], base['stride']) == (32, 16)
    assert difference == {'model': 'difference',
                          'bits/byte': pytest.approx(ours['bits/byte'] - base['bits/byte'])}

@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_weights_in_half_precision_change_no_digit_of_what_autocast_computes(
        results, chars, tmp_path, monkeypatch, dtype):
    (model, path), seen, hidden_of = chars, set(), GPT.hidden
    monkeypatch.setattr(GPT, 'hidden', lambda self, x:
                        seen.add(self.transformer.h[1].mlp.c_fc.weight.dtype) or hidden_of(self, x))
    (tmp_path / 'text.txt').write_text(TEXT[:15], encoding='utf-8')
    ids = CharTokenizer(CHARS).encode(TEXT[:15])
    with torch.no_grad(), torch.autocast('cpu', getattr(torch, dtype)):
        hidden = model.hidden(torch.tensor([ids[:-1]]))
    nats = F.cross_entropy(model.lm_head(hidden.float())[0], torch.tensor(ids[1:]),
                           reduction='none').double().mean().item()
    figures, = results(f'--out_dir={path}', f"--file={tmp_path / 'text.txt'}", '--device=cpu',
                       '--base=none', f'--dtype={dtype}')
    assert getattr(torch, dtype) in seen
    exact, = results(f'--out_dir={path}', f"--file={tmp_path / 'text.txt'}", *CPU)
    assert figures['nats/token'] == pytest.approx(nats, abs=1e-9) != exact['nats/token']

def test_that_a_text_is_scored_without_the_model_s_template_is_told(run, chars, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT[:15])
    torch.save({**torch.load(chars[1]), 'template': '{instruction}'}, tmp_path / 'ckpt.pt')
    for path, told in ((tmp_path / 'ckpt.pt', True), (chars[1], False)):
        out = run('evaluate.py', f'--out_dir={path}', f"--file={tmp_path / 'text.txt'}", *CPU).out
        assert (', as plain text, without its template, in' in out) == told

def test_a_script_that_runs_out_of_memory_names_options_of_its_own(run, chars, tmp_path):
    for kind, where, ways in (
            ('torch.OutOfMemoryError', 'CUDA out of memory', ', or type --device=cpu'),
            ('MemoryError', 'no room', ''),
            ('torch.OutOfMemoryError', "DefaultCPUAllocator: can't allocate memory", '')):
        (tmp_path / 'full.py').write_text(
            f'import torch, model\ndef _full(*args, **options):\n    raise {kind}("{where}")\n'
            'model.GPT.hidden = _full\n')
        for script, smaller in (('sample.py', '--num_samples or --max_new_tokens'),
                                ('evaluate.py', '--batch_size or --block_size')):
            error = run(script, tmp_path / 'full.py', f'--out_dir={chars[1]}', '--device=cpu',
                        status=2).err.splitlines()[-1]
            assert error == (f'error: out of memory ({where}); type a smaller {smaller}{ways}, '
                             'or take a smaller model')

def test_a_mask_leaves_its_tokens_out_and_end_of_text_has_no_bytes(evaluate, theirs, bpe, tmp_path):
    ids = BPE.encode(STORY[:200]) + [BPE.eot] + BPE.encode(STORY[:200])
    mask = np.random.default_rng(0).integers(0, 2, len(ids)).astype(np.uint8)
    mask[ids.index(BPE.eot)] = 1
    np.array(ids, '<u2').tofile(tmp_path / 'train.bin')
    mask.tofile(tmp_path / 'train_mask.bin')
    _, out, _ = evaluate(f'--out_dir={bpe}', f'--dataset={tmp_path}', '--split=train', '--json=True', *CPU)
    nats = np.array(sliding(theirs, ids, 32, 16))[mask[1:] > 0]
    scored = [i for i, counts in zip(ids[1:], mask[1:]) if counts and i != BPE.eot]
    result, = json.loads(out)['results']
    assert 'its mask leaves out' in json.loads(out)['source']
    assert result['tokens'] == len(nats) == len(scored) + 1
    assert result['bytes'] == sum(len(BPE.token_bytes(i)) for i in scored)
    assert result['nats/token'] == pytest.approx(nats.mean(), rel=1e-5)

def test_each_item_is_scored_by_itself_as_it_is_asked(results, theirs, bpe, tmp_path):
    items = [([11, 12, 13, 14, 50256], [0, 0, 1, 1, 2]), ([7, 8, 50256] * 15, [0, 1, 1] * 14 + [0, 1, 2]),
             ([9, 10], [0, 2])]
    ids, mask = (np.array(sum(parts, [])) for parts in zip(*items))
    ids.astype('<u2').tofile(tmp_path / 'val.bin')
    mask.astype('u1').tofile(tmp_path / 'val_mask.bin')
    nats = [nats for its, counts in items
            for nats, scored in zip(sliding(theirs, its, 32, 16), counts[1:]) if scored]
    result, = results(f'--out_dir={bpe}', f'--dataset={tmp_path}', *CPU)
    assert result['tokens'] == len(nats) and result['nats/token'] == pytest.approx(np.mean(nats), rel=1e-5)
    first, = results(f'--out_dir={bpe}', f'--dataset={tmp_path}', '--limit=7', *CPU) # the second item is cut
    assert first['tokens'] == 4 and first['nats/token'] == pytest.approx(np.mean(nats[:4]), rel=1e-5)

def answer(model, context, answer):
    """ by hand: (nats of the answer after the last of the context, whether it is greedy's) """
    n, ids = len(BPE.encode(answer)), BPE.encode(context + answer)
    # 32 positions; the last is not read
    probs, target = log_probs(model, ids[-33:])[-n:], torch.tensor(ids[-n:])
    return -probs.gather(1, target[:, None]).sum().item(), bool((probs.argmax(-1) == target).all())

def numbers(cells):
    return [float(cell.replace(',', '')) for cell in cells]

def write_lines(path, items):
    path.write_text('\n'.join(json.dumps(item) for item in items) + '\n\n', encoding='utf-8')
    return f'--file={path}'

def test_lambada_counts_last_words_whose_tokens_are_all_the_likeliest(results, theirs, bpe, tmp_path):
    file = write_lines(tmp_path / 'lambada.jsonl', [{'text': text} for text in LAMBADA])
    result, = results(f'--out_dir={bpe}', '--task=lambada', file, *CPU)
    by_hand = [answer(theirs, text.rstrip()[:-len(word)], word) for text, word in zip(LAMBADA, LAST_WORDS)]
    assert result['scores'] == pytest.approx([-nats for nats, _ in by_hand], rel=1e-5)
    assert result['perplexity'] == pytest.approx(math.exp(np.mean([nats for nats, _ in by_hand])), rel=1e-5)
    assert result['accuracy'] == np.mean([right for _, right in by_hand]) and 0 < result['accuracy'] < 1
    assert (result['items'], result['cut']) == (4, 1)

def test_hellaswag_takes_the_likeliest_ending_and_the_likeliest_for_its_characters(
        results, theirs, bpe, tmp_path):
    file = write_lines(tmp_path / 'hellaswag.jsonl', HELLASWAG)
    result, = results(f'--out_dir={bpe}', '--task=hellaswag', file, *CPU, '--batch_size=4')
    contexts = 'A man is on a roof. he', 'The dog', 'Boil water. then', ('on and ' * 30).rstrip()
    nats = np.array([[answer(theirs, context, ' ' + ending)[0] for ending in item['endings']]
                     for context, item in zip(contexts, HELLASWAG)])
    lengths = np.array([[len(ending) for ending in item['endings']] for item in HELLASWAG])
    labels = [3, 2, 2, 1]
    np.testing.assert_allclose(result['scores'], -nats, rtol=1e-5)
    assert result['acc'] == np.mean(nats.argmin(1) == labels)
    assert result['acc_norm'] == np.mean((nats / lengths).argmin(1) == labels) != result['acc']
    assert (nats / (lengths + 1)).argmin(1)[2] != 2 # it is without the space that the third item is right
    assert (result['items'], result['cut']) == (4, 1)

def test_an_answer_longer_than_the_context_is_scored_whole(results, chars, tmp_path):
    model, path = chars
    context, word = 'a context of more than sixteen', ' ' + 'word' * 6
    file = write_lines(tmp_path / 'lambada.jsonl', [{'text': context + word}] * 2)
    result, = results(f'--out_dir={path}', '--task=lambada', file, '--limit=1', *CPU)
    ids = CharTokenizer(CHARS).encode(context[-16:] + word)
    assert result['scores'] == pytest.approx([-sum(sliding(model, ids, 16, 8)[15:])], rel=1e-5)
    assert (result['items'], result['cut']) == (1, 1)

CASES = [ # options, part of what is said
    ('--task=piqa', 'with one of perplexity, lambada, hellaswag'),
    ('--task=lambada', 'lambada has no file'),
    ('--batch_size=0', 'at least 1'),
    ('--task=lambada --file={root}/none.jsonl', 'there is no file'),
    ('--task=lambada --file={root}/empty', 'is empty'),
    ('--task=lambada --file={root}/broken', 'broken, line 2: '),
    ('--task=lambada --file={root}/one', 'one, line 1: '),
    ('--task=hellaswag --file={root}/field', "field, line 3: no 'label'"),
    ('--task=hellaswag --file={root}/three', 'three, line 1: '),
    ('--task=lambada --file={root}/foreign', "foreign, line 1: the character '東' is not in"),
    ('--file={root}/empty', 'nothing to score'),
    ('--stride=17', '--stride=16 or less'),
    ('--block_size=17', '--block_size=16 or less'),
    ('--base={root}/none', 'there is no model'),
    ('--base={bpe}', 'type --file=PATH'),
    ('--dataset={root}', f'is not in the {len(CHARS)} tokens that'),
    ('--dataset=none', 'there is no data/none/val.bin'),
    ('--dataset={root}/nan --init_from={bpe}', 'nothing to score'),
    ('--out_dir={root}', 'there is no checkpoint in'),
]

@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    root = tmp_path_factory.mktemp('broken')
    (root / 'empty').write_text('')
    (root / 'broken').write_text('{"text": "a b"}\n{"text": "a b"\n')
    (root / 'one').write_text('{"text": "word"}\n')
    (root / 'field').write_text(
        f'{json.dumps(HELLASWAG[0])}\n\n{{"ctx": "a", "endings": ["a", "b", "c", "d"]}}')
    (root / 'three').write_text('{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}')
    (root / 'foreign').write_text('{"text": "東 b"}', encoding='utf-8')
    np.arange(200, dtype='<u2').tofile(root / 'val.bin')
    (root / 'nan').mkdir()
    np.arange(9, dtype='<u2').tofile(root / 'nan' / 'val.bin')
    np.zeros(9, dtype=np.uint8).tofile(root / 'nan' / 'val_mask.bin')
    return root

@pytest.mark.parametrize('options, message', CASES, ids=[o for o, _ in CASES])
def test_one_line_and_status_2(evaluate, chars, bpe, broken, options, message):
    args = [part.format(root=broken, bpe=bpe) for part in options.split()]
    status, out, err = evaluate(f'--out_dir={chars[1]}', *CPU, *args)
    assert [line for line in err.splitlines() if line.startswith('error: ')] == err.splitlines()[-1:]
    assert status == 2 and message in err.splitlines()[-1] and 'Traceback' not in err and not out

@pytest.mark.skipif(sys.platform == 'win32', reason="Windows has no SIGINT to send")
def test_ctrl_c_prints_no_figures(clone, chars):
    command = [sys.executable, 'evaluate.py', f'--out_dir={chars[1]}', *CPU, '--split=train', '--stride=1',
               '--batch_size=1']
    process = subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun = b''
    while b'tok/s' not in begun and process.poll() is None: # its progress bar
        begun += os.read(process.stderr.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b'' and b'Traceback' not in err

def test_a_model_and_a_base_that_reads_more_are_compared_at_the_context_of_both(results, chars, tmp_path):
    file = tmp_path / 'a.txt'
    file.write_text(TEXT[:300])
    folders = []
    for block_size in (16, 32):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size, len(CHARS), 1, 1, 16))
        folders.append(tmp_path / str(block_size))
        folders[-1].mkdir()
        torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 0,
                    'tokenizer': {'name': 'char', 'chars': CHARS}}, folders[-1] / 'ckpt.pt')
    for first, second in (folders, folders[::-1]):
        ours, base, _ = results(f'--out_dir={first}', f'--base={second}', f'--file={file}')
        assert {(one['context'], one['stride']) for one in (ours, base)} == {(16, 8)}

def test_each_dataset_of_a_mixture_is_scored_as_a_text_of_its_own(results, theirs, bpe, tmp_path):
    nats = []
    for name, text in (('a', STORY[:150]), ('b', STORY[40:120])):
        (tmp_path / name).mkdir()
        np.array(BPE.encode(text), '<u2').tofile(tmp_path / name / 'val.bin')
        nats += sliding(theirs, BPE.encode(text), 32, 16)
    result, = results(f'--out_dir={bpe}', f"--dataset={tmp_path / 'a'},{tmp_path / 'b'}", *CPU)
    assert result['tokens'] == len(nats) and result['nats/token'] == pytest.approx(np.mean(nats), rel=1e-5)

def test_models_of_different_tokens_are_not_compared_on_parts_of_different_length(
        evaluate, chars, bpe, tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT[:300], encoding='utf-8')
    status, out, err = evaluate(f'--out_dir={chars[1]}', f'--base={bpe}', f"--file={tmp_path / 'a.txt'}",
                                '--device=cpu', '--limit=50')
    assert status == 2 and not out
    assert 'have different tokens' in err.splitlines()[-1] and 'without --limit' in err.splitlines()[-1]
