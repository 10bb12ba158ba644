"""
What a user can get wrong: one line that says what to do, exit status 2, no traceback, and nothing written.
"""
import os

import numpy as np
import pytest
import torch

from conftest import CHARS, TINY
from model import GPT, GPTConfig
from test_dataset import Hostile

@pytest.fixture(scope='module')
def broken(clone, tmp_path_factory):
    """ a folder of files that are wrong in one way each, and datasets likewise in data/ """
    root = tmp_path_factory.mktemp('broken')
    for name, content in (('empty', b''), ('odd', b'\1\0\2'), ('short', b'\1\0' * 5)):
        (clone / 'data' / name).mkdir()
        for split in ('train', 'val'):
            (clone / 'data' / name / f'{split}.bin').write_bytes(content)
    (clone / 'data' / 'beyond').mkdir()
    for split in ('train', 'val'):
        np.full(500, 60000, dtype='<u2').tofile(clone / 'data' / 'beyond' / f'{split}.bin')
    for name in ('badmeta', 'unprepared'):
        (clone / 'data' / name).mkdir()
    (clone / 'data' / 'unprepared' / 'prepare.py').write_text('')
    (clone / 'data' / 'badmeta' / 'meta.pkl').write_bytes(b'junk')
    model = GPT(GPTConfig(16, len(CHARS), 1, 1, 8))
    good = {'model': model.state_dict(), 'model_args': model.config.__dict__,
            'tokenizer': {'name': 'char', 'chars': CHARS}}
    torch.save(good, root / 'good.pt')
    torch.save({**good, 'model': []}, root / 'list.pt')
    torch.save({**good, 'tokenizer': {'name': 'char'}}, root / 'nochars.pt')
    torch.save({**good, 'tokenizer': {'name': 'char', 'chars': CHARS[::-1]}}, root / 'other.pt')
    (root / 'cut.pt').write_bytes((root / 'good.pt').read_bytes()[:3000])
    torch.save({'model': Hostile(str(root / 'ran')), 'model_args': {}}, root / 'hostile.pt')
    (root / 'typo.py').write_text('batchsize = 4')
    (root / 'broken.py').write_text('batch_size = = 4')
    (root / 'file').write_text('a file, not a folder')
    (root / 'nothing').mkdir()
    (root / 'latin1.txt').write_bytes('café'.encode('latin-1'))
    (root / 'tiny.txt').write_text('a')
    (root / 'blank.txt').write_text(' \n')
    return root

GPU = '--device=cuda' if not torch.cuda.is_available() else '--device=cuda:99'
CASES = [ # script, options, part of what is said
    ('train.py', '--batchsize=4', 'did you mean batch_size?'),
    ('train.py', '--batch_size=many', 'takes a whole number'),
    ('train.py', '--batch_size=0', 'at least 1'),
    ('train.py', '--eval_interval=0', 'at least 1'),
    ('train.py', '--learning_rate=-1.0', 'at least 0'),
    ('train.py', '--learning_rate=nan', 'takes a number'),
    ('train.py', '--beta2=1.0', 'both below 1'),
    ('train.py', '--min_lr=1.0', 'is above learning_rate'),
    ('train.py', '--seed=99999999999999999999', 'below 2**32'),
    ('train.py', '--init_from={root}/list.pt', 'has no model'),
    ('train.py', '{root}/typo.py', 'did you mean batch_size?'),
    ('train.py', '{root}/broken.py', 'line 1: SyntaxError'),
    ('train.py', 'config/gpt2_small.py', 'did you mean config/finetune/gpt2_small.py?'),
    ('train.py', '--dataset=shakespear', 'did you mean --dataset=shakespeare?'),
    ('train.py', '--dataset=unprepared', 'run python data/unprepared/prepare.py first'),
    ('train.py', '--dataset=zzz', 'data/custom/prepare.py'),
    ('train.py', '--dataset=empty', 'is empty'),
    ('train.py', '--dataset=odd', 'an odd number'),
    ('train.py', '--dataset=short', 'too few for block_size = 16'),
    ('train.py', '--dataset=beyond', 'token id 60000'),
    ('train.py', '--dataset=badmeta', 'cannot use data/badmeta/meta.pkl'),
    ('train.py', '--n_head=3', 'type --n_head='),
    ('train.py', '--n_layer=0', 'at least 1'),
    ('train.py', '--dropout=1.0', '0 <= P < 1'),
    ('train.py', GPU, 'there is no device'),
    ('train.py', '--dtype=fp16', 'there is no dtype'),
    ('train.py', '--optimizer=sgd', '--optimizer=adamw'),
    ('train.py', '--compile=maybe', '--compile=auto'),
    ('train.py', '--plan=ram', 'with one of: auto, device, recompute, offload'),
    ('train.py', '--plan=offload --optimizer=muon', 'is for one process and adamw'),
    ('train.py', '--memory_gb=0.7 --n_embd=2048', 'no plan fits: offload'),
    ('train.py', '--init_from=resume', 'there is no checkpoint in'),
    ('train.py', '--init_from=resum', "there is no model 'resum'"),
    ('train.py', '--init_from={root}/nothing', 'nor a Hugging Face model'),
    ('train.py', '--init_from={root}/cut.pt', 'cut short, damaged'),
    ('train.py', '--init_from={root}/hostile.pt', 'could run code'),
    ('train.py', '--init_from={root}/other.pt', 'type --dataset'),
    ('train.py', '--init_from={root}/good.pt --block_size=32', 'the model has 16 positions'),
    ('train.py', '--init_from={hf}', 'type --dataset'),
    ('train.py', '--out_dir={root}/file/out', 'cannot write to'),
    ('sample.py', '--out_dir={root}/nothing', 'there is no checkpoint in'),
    ('sample.py', '--out_dir={root}/cut.pt', 'cut short, damaged'),
    ('sample.py', '--out_dir={root}/hostile.pt', 'could run code'),
    ('sample.py', '--out_dir={root}/nochars.pt', 'type --dataset'),
    ('sample.py', '--out_dir={root}/good.pt --start=東', "the character '東' is not in"),
    ('sample.py', '--out_dir={root}/good.pt --start=FILE:none.txt', 'cannot read the prompt'),
    ('sample.py', '--out_dir={root}/good.pt --num_samples=0', 'at least 1'),
    ('sample.py', '--out_dir={root}/good.pt --temperature=-1', 'at least 0'),
    ('sample.py', '--out_dir={root}/good.pt --top_p=0', '0 < P <= 1'),
    ('data/custom/prepare.py', '', 'type --input=PATH'),
    ('data/custom/prepare.py', '--input={root}/none.txt', 'there is no'),
    ('data/custom/prepare.py', '--input={root}/latin1.txt', 'is not UTF-8 at byte 3'),
    ('data/custom/prepare.py', '--input={root}/blank.txt', 'there is no text'),
    ('data/custom/prepare.py', '--input={root}/typo.py --val_fraction=1.5', 'between 0 and 1'),
    ('data/custom/prepare.py', '--input={root}/typo.py --tokenizer=bert', 'no tokenizer'),
    ('data/custom/prepare.py', '--input={root}/typo.py --name=../x', 'a plain name'),
    ('data/custom/prepare.py', '--input={root}/typo.py --name=quickstart', "of the project's own"),
    ('data/custom/prepare.py', '--input={root}/tiny.txt --name=tiny --val_fraction=0.01', 'too few'),
    ('plot.py', '', 'type python plot.py'),
]

def listing(*folders):
    """ every file with its size and the time of its last change """
    paths = [os.path.join(f, n) for top in folders for f, _, names in os.walk(top) for n in names if '__pycache__' not in f]
    return sorted((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)

@pytest.mark.parametrize('script, options, message', CASES, ids=[f'{s} {o}' for s, o, _ in CASES])
def test_one_line_and_status_2(run, clone, broken, hf_dir, script, options, message):
    args = [part.format(root=broken, hf=hf_dir) for part in options.split()]
    if script == 'train.py':
        given = {a.split('=')[0] for a in args}
        args = ['--dataset=chars', *(t for t in TINY if t.split('=')[0] not in given), *args]
    elif script == 'sample.py':
        args += ['--device=cpu']
    before = listing(clone, broken)
    done = run(script, *args, status=2)
    lines = done.err.splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:], done.err
    assert message in lines[-1] and 'Traceback' not in done.err
    assert listing(clone, broken) == before and not done.out_dir.exists()

def test_no_hostile_file_ran(broken):
    assert not (broken / 'ran').exists()
