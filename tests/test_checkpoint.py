import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from dataclasses import asdict

import pytest
import torch

import checkpoint as checkpoints
import saver
from conftest import ROOT
from model import GPT, GPTConfig
from test_dataset import Hostile

def make(**extra):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 11, 2, 2, 8))
    return model, {'model': model.state_dict(), 'model_args': checkpoints.model_args(model), **extra}

def test_a_saved_model_comes_back_equal(tmp_path):
    model, dictionary = make(tokenizer={'name': 'gpt2'})
    saver.save(dictionary, str(tmp_path / 'ckpt.pt'))
    again, rest = checkpoints.load_model(str(tmp_path), dropout=0.25)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert again.lm_head.weight is again.transformer.wte.weight and again.config.dropout == 0.25
    assert rest['tokenizer'] == {'name': 'gpt2'}

def test_moments_come_into_memory_only_where_they_are_asked_for(tmp_path):
    model, dictionary = make(optimizer={'state': {0: torch.ones(3)}}, iter_num=2)
    path = str(tmp_path / 'ckpt.pt')
    saver.save(dictionary, path)
    assert checkpoints.load(path, moments=True)['optimizer']['state'][0].equal(torch.ones(3))
    held = checkpoints.load(path)
    assert 'optimizer' not in held and held['iter_num'] == 2
    if os.path.exists('/proc/self/maps'): # so that it may be replaced, and the disk gets its room back
        assert path not in open('/proc/self/maps').read()
    with open(path, 'r+b') as file: # or written over
        file.write(bytes(os.path.getsize(path)))
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in held['model'].items())
    assert held['model']['lm_head.weight'].data_ptr() == held['model']['transformer.wte.weight'].data_ptr()

def test_the_shape_of_a_model_is_told_without_its_weights(tmp_path, monkeypatch):
    model, dictionary = make()
    saver.save(dictionary, str(tmp_path / 'last.pt'))
    (tmp_path / 'ckpt.pt').write_bytes(b'damaged')
    monkeypatch.setattr(checkpoints, 'load', None)
    assert checkpoints.config_of('resume', str(tmp_path), asdict(GPTConfig())) == model.config
    assert checkpoints.config_of(str(tmp_path / 'last.pt'), '', asdict(GPTConfig())) == model.config

def test_the_keys_are_nanogpt_s():
    model, dictionary = make()
    assert set(dictionary['model_args']) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias',
                                             'vocab_size', 'dropout'}
    block = {f'{part}.{kind}'
             for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
             for kind in ('weight', 'bias')}
    expected = {f'transformer.h.{i}.{name}' for i in range(2) for name in block} | {
        'transformer.wte.weight', 'transformer.wpe.weight',
        'transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight'}
    assert set(dictionary['model']) == expected

@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_a_nanogpt_checkpoint_loads(tmp_path, prefix):
    model, dictionary = make(iter_num=7, best_val_loss=torch.tensor(1.5), config={'dataset': 'x'})
    dictionary['model'] = {prefix + name: tensor for name, tensor in dictionary['model'].items()}
    dictionary['model'][f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8).tril() # of old nanoGPT
    torch.save(dictionary, tmp_path / 'ckpt.pt')
    again, rest = checkpoints.load_model(str(tmp_path / 'ckpt.pt'))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert rest['iter_num'] == 7 and 'tokenizer' not in rest

def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / 'last.pt')
    saver.save({'iter_num': 1}, path)
    before = open(path, 'rb').read()
    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='what it held before is whole'):
        saver.save({'iter_num': 2}, path)
    assert open(path, 'rb').read() == before and os.listdir(tmp_path) == ['last.pt']

def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(tmp_path):
    """ a limit on the size of files stands in for a full disk, in a process of its own """
    code = ("import saver, resource, signal, sys, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "saver.save({'n': 1}, sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
            "saver.save({'n': torch.zeros(1000000)}, sys.argv[1])")
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'last.pt')], cwd=ROOT,
                          capture_output=True, encoding='utf-8')
    assert 'OSError: cannot save' in done.stderr
    assert torch.load(tmp_path / 'last.pt')['n'] == 1 and os.listdir(tmp_path) == ['last.pt']

@pytest.mark.parametrize('name', ['vocab.json', 'tokenizer.json'])
def test_a_hugging_face_model_of_another_vocabulary_is_refused(tmp_path, hf_dir, name):
    shutil.copytree(hf_dir, tmp_path / 'hf')
    gpt2 = {'Hello': 15496, 'er': 263, '\u0120the': 262, '\u0120world': 995}
    for vocab in (gpt2, {**gpt2, 'Hello': 1}):
        content = vocab if name == 'vocab.json' else {'model': {'vocab': vocab}}
        (tmp_path / 'hf' / name).write_text(json.dumps(content))
        if vocab == gpt2:
            assert checkpoints.load_model(str(tmp_path / 'hf'))[1] == {'tokenizer': {'name': 'gpt2'}}
        else:
            with pytest.raises(OSError, match="is not GPT-2's vocabulary"):
                checkpoints.load_model(str(tmp_path / 'hf'))

def test_tokens_that_others_added_to_gpt_2_s_are_told(tmp_path, hf_dir, capsys):
    shutil.copytree(hf_dir, tmp_path / 'hf')
    for name, content in (
            ('added_tokens.json', {'<|user|>': 50258}),
            ('tokenizer.json', {
                'model': {'vocab': {'Hello': 15496, 'er': 263, '\u0120the': 262, '\u0120world': 995}},
                'added_tokens': [{'id': 50256, 'content': '<|endoftext|>'},
                                 {'id': 50257, 'content': '<|pad|>'}]})):
        (tmp_path / 'hf' / name).write_text(json.dumps(content))
    assert checkpoints.load_model(str(tmp_path / 'hf'))[1] == {'tokenizer': {'name': 'gpt2'}}
    assert ("warning: its tokenizer adds <|pad|>, <|user|> to GPT-2's tokens; here they are ordinary text"
            in capsys.readouterr().err)

@pytest.mark.parametrize('links', [True, False])
def test_the_best_is_the_latest_file_and_stays_when_that_is_replaced(tmp_path, monkeypatch, links):
    if not links: # as on FAT
        monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(OSError('no links')))
    last, best = str(tmp_path / 'last.pt'), str(tmp_path / 'ckpt.pt')
    for n in (1, 2):
        saver.save({'iter_num': n}, last)
        saver.link(last, best)
        assert os.path.samefile(last, best) == links
    saver.save({'iter_num': 3}, last)
    assert torch.load(best)['iter_num'] == 2 and torch.load(last)['iter_num'] == 3

def test_a_copy_for_which_the_disk_has_no_room_leaves_nothing_and_the_latest_counts_as_saved(
        tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'link', refuse)
    monkeypatch.setattr(saver.shutil, 'copyfileobj', refuse)
    to = saver.Saver(str(tmp_path), False)
    assert not to({'iter_num': 7, 'model': {'w': torch.ones(2)}}, is_best=True)
    assert [path.name for path in tmp_path.iterdir()] == ['last.pt'] and to.saved == 7
    to.check()
    assert 'warning: the last save failed; ' in capsys.readouterr().err

def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    marker = str(tmp_path / 'ran')
    torch.save({'model': Hostile(marker), 'model_args': {}}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='could run code'):
        checkpoints.load(str(tmp_path / 'ckpt.pt'))
    (tmp_path / 'plain.pt').write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(ValueError, match='cannot use'):
        checkpoints.load(str(tmp_path / 'plain.pt'))
    assert not os.path.exists(marker)

def damaged(dictionary):
    """ what may be wrong with a checkpoint, and a part of what is said """
    yield lambda d: d.pop('model'), 'has no model'
    yield lambda d: d['model'].pop('transformer.wpe.weight'), 'does not fit together'
    yield lambda d: d['model_args'].update(n_layer=3), 'does not fit together'
    yield lambda d: d['model_args'].update(n_heads=3), 'does not fit together'
    yield lambda d: d.update(version=99), 'format 99'

@pytest.mark.parametrize('case', range(5))
def test_a_damaged_checkpoint_is_told_in_one_error(tmp_path, case):
    _, dictionary = make()
    spoil, message = list(damaged(dictionary))[case]
    spoil(dictionary)
    torch.save({'version': 1, **dictionary}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(str(tmp_path))

def test_a_truncated_checkpoint_is_told(tmp_path):
    _, dictionary = make()
    saver.save(dictionary, str(tmp_path / 'whole.pt'))
    whole = (tmp_path / 'whole.pt').read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / 'ckpt.pt').write_bytes(whole[:length])
        with pytest.raises(ValueError, match='cut short'):
            checkpoints.load(str(tmp_path / 'ckpt.pt'))

def test_a_copy_in_place_of_a_link_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError('no links')
    synced = []
    monkeypatch.setattr(os, 'link', refuse)
    monkeypatch.setattr(os, 'fsync', lambda number: synced.append(os.fstat(number).st_size))
    (tmp_path / 'last.pt').write_bytes(b'x' * 100)
    saver.link(str(tmp_path / 'last.pt'), str(tmp_path / 'ckpt.pt'))
    assert synced == [100] and (tmp_path / 'ckpt.pt').read_bytes() == b'x' * 100

@pytest.fixture
def windows(monkeypatch):
    """ the locks of Windows, made of ours """
    def locking(file, mode, n):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, 'Permission denied') from None
    fcntl, theirs = pytest.importorskip('fcntl', reason="here its own are used"), types.ModuleType('msvcrt')
    theirs.locking, theirs.LK_NBLCK = locking, 2
    monkeypatch.setitem(sys.modules, 'msvcrt', theirs)
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setattr(saver.time, 'sleep', lambda seconds: None)
    return locking

def test_a_folder_that_a_run_writes_to_is_no_other_s_on_windows(tmp_path, windows):
    with open(tmp_path / '.lock', 'w') as other:
        windows(other, 2, 1)
        with pytest.raises(FileExistsError, match='another run is writing to'):
            saver.Saver(str(tmp_path), False).lock()
    saver.Saver(str(tmp_path), False).lock()

def test_a_notebook_s_next_run_gives_up_what_its_last_has_locked(tmp_path):
    fcntl = pytest.importorskip('fcntl', reason="Windows has other locks")
    for folder in ('a', 'a', 'b'):
        saver.Saver(str(tmp_path / folder), False).lock()
    with open(tmp_path / 'a' / '.lock') as free, open(tmp_path / 'b' / '.lock') as taken:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)

def test_without_locks_a_run_is_warned_and_refused_if_it_was_overtaken(tmp_path, monkeypatch, capsys):
    def none(file):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(saver, 'take', none)
    ours = saver.Saver(str(tmp_path), False)
    (tmp_path / 'last.pt').touch()
    with pytest.raises(FileExistsError, match='another run has just saved'):
        ours.lock()
    assert 'warning: no file can be locked in' in capsys.readouterr().err

@pytest.mark.parametrize('n', [3, 99])
def test_a_file_that_another_program_reads_is_replaced_once_it_has_done_so(tmp_path, monkeypatch, n):
    """ as Windows' scanners do """
    refusals, replace = iter(range(n)), os.replace
    def refuse(*paths):
        if next(refusals, None) is not None:
            raise PermissionError(13, 'Access is denied')
        replace(*paths)
    monkeypatch.setattr(saver.os, 'replace', refuse)
    monkeypatch.setattr(saver.time, 'sleep', lambda seconds: None)
    if n == 3:
        saver.save({'iter_num': 1}, str(tmp_path / 'last.pt'))
        assert torch.load(tmp_path / 'last.pt')['iter_num'] == 1
    else:
        with pytest.raises(OSError, match='cannot save .*Access is denied'):
            saver.save({'iter_num': 1}, str(tmp_path / 'last.pt'))

@pytest.mark.parametrize('anew', [False, True])
def test_what_a_killed_save_left_is_removed_and_a_resumed_run_s_checkpoints_stay(tmp_path, anew):
    out = tmp_path / 'lr[3e-4]' # a name that is a pattern
    out.mkdir()
    for name in ('last.pt', 'iter_000004.pt', 'iter_000008.pt.tmp', 'mine.txt'):
        (out / name).touch()
    saver.Saver(str(out), False).clear(anew)
    assert sorted(os.listdir(out)) == (['mine.txt'] if anew else ['iter_000004.pt', 'last.pt', 'mine.txt'])

def test_a_save_that_succeeds_makes_up_for_one_that_failed(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(28, 'No space left on device')
    to = saver.Saver(str(tmp_path), False)
    with monkeypatch.context() as patch:
        patch.setattr(saver, 'save', refuse)
        assert not to({'iter_num': 1, 'model': {'w': torch.ones(2)}}, is_best=True)
    assert to({'iter_num': 2, 'model': {'w': torch.ones(2)}}, is_best=True)
    capsys.readouterr()
    to.check()
    assert capsys.readouterr().err == ''

def test_a_byte_far_into_a_large_tensor_does_not_change_unnoticed(tmp_path):
    path = tmp_path / 'last.pt'
    saver.save({'model': {'w': torch.zeros(6 * 2**20)}, 'model_args': {}}, str(path)) # 24 MB
    with open(path, 'r+b') as file:
        file.seek(20 * 2**20)
        file.write(b'\1')
    with pytest.raises(ValueError, match='is damaged: of its bytes'):
        checkpoints.load(str(path))

def test_a_meta_pkl_of_another_model_beside_a_checkpoint_is_passed_over(tmp_path):
    meta = {'vocab_size': 3, 'itos': dict(enumerate('abc')), 'stoi': {c: i for i, c in enumerate('abc')}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    path = str(tmp_path / 'ckpt.pt')
    assert checkpoints.tokenizer_beside(path, 3) == {'tokenizer': {'name': 'char', 'chars': list('abc')}}
    assert checkpoints.tokenizer_beside(path, 4) == {}

def test_a_number_of_iterations_below_0_is_refused(tmp_path):
    saver.save({'model': {}, 'model_args': {}, 'iter_num': -1}, str(tmp_path / 'ckpt.pt'))
    with pytest.raises(ValueError, match='the iter_num of .* is -1'):
        checkpoints.load(str(tmp_path / 'ckpt.pt'))
