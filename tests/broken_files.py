"""
Files that are wrong in one way each, for test_bad_input.py: datasets, checkpoints, and what else a user may
name.
"""
import gzip
import json
import os
import pickle
import shutil

import numpy as np
import torch

import lora
from conftest import CHARS, TEXT
from model import GPT, GPTConfig
from test_dataset import Hostile

META = {'vocab_size': len(CHARS), 'stoi': {c: i for i, c in enumerate(CHARS)}, 'itos': dict(enumerate(CHARS))}

def write_dataset(folder, chars, **files):
    """ the dataset of characters in `chars`, with other files in place of some, or None for none """
    shutil.copytree(chars, folder)
    for name, content in files.items():
        path = folder / name.replace('__', '.')
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        elif content != b'none':
            path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))

def write_datasets(data, marker):
    """ datasets that are wrong in one way each """
    chars, n = data / 'chars', os.path.getsize(data / 'chars' / 'train.bin') // 2
    for name, content in (('empty', b''), ('odd', b'\1\0\2'), ('short', b'\1\0' * 5)):
        write_dataset(data / name, chars, train__bin=content, val__bin=content)
    beyond = np.full(500, 60000, dtype='<u2').tobytes()
    write_dataset(data / 'beyond', chars, train__bin=beyond, val__bin=beyond)
    write_dataset(data / 'bpe', chars, meta__pkl=b'none')
    write_dataset(data / 'noval', chars, val__bin=b'none')
    write_dataset(data / 'numbered', chars, meta__pkl={'vocab_size': len(CHARS)})
    write_dataset(data / 'binfolder', chars, train__bin=None)
    write_dataset(data / 'maskfolder', chars, train_mask__bin=None)
    write_dataset(data / 'shortmask', chars, train_mask__bin=b'\1' * (n - 1))
    write_dataset(data / 'hidden', chars, train_mask__bin=b'\0' * n)
    write_dataset(data / 'latintemplate', chars, template__txt='{instruction} é'.encode('latin-1'))
    write_dataset(data / 'notemplate', chars, template__txt=b'no question')
    write_dataset(data / 'templatefolder', chars, template__txt=None)
    for name, meta in (('junk', b'junk'), ('folder', None), ('list', [1, 2]), ('hostile', Hostile(marker)),
                       ('text', {**META, 'vocab_size': '65'}),
                       ('none', {**META, 'vocab_size': 0, 'itos': {}}),
                       ('fewer', {**META, 'vocab_size': len(CHARS) - 1})):
        write_dataset(data / f'{name}meta', chars, meta__pkl=meta)
    (data / 'unprepared').mkdir()
    (data / 'unprepared' / 'prepare.py').write_text('')
    (data / 'afile').write_text('a file, not a folder')

def write_checkpoints(root):
    """ good.pt, and others that are wrong in one way each """
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, len(CHARS), 1, 1, 8))
    good = {'model': model.state_dict(), 'model_args': model.config.__dict__, 'config': {'dataset': 'chars'},
            'tokenizer': {'name': 'char', 'chars': CHARS}}
    def args(**changes):
        return {'model_args': {**good['model_args'], **changes}}
    def characters(chars):
        return {'tokenizer': {'name': 'char', 'chars': chars}}
    wte = 'transformer.wte.weight'
    for name, changes in {
            'good': {}, 'list': {'model': []}, 'noargs': {'model_args': None}, 'newer': {'version': 99},
            'textargs': args(n_layer='1'), 'negative': args(block_size=-1),
            'vocabulary': args(vocab_size=10**15), 'layers': args(n_layer=2), 'floatargs': args(n_embd=8.0),
            'tensorargs': args(n_layer=torch.zeros(3)),
            'textweight': {'model': {**good['model'], wte: 'abc'}},
            'nan': {'model': {name: tensor * float('nan') for name, tensor in good['model'].items()}},
            'nochars': {'tokenizer': {'name': 'char'}},
            'numberchars': {'tokenizer': {'name': 'char', 'chars': 5}},
            'other': characters(CHARS[::-1]), 'bert': {'tokenizer': {'name': 'bert'}},
            'numbers': {'tokenizer': {'name': 'numbers', 'n_vocab': len(CHARS)}},
            'samechars': characters(['a'] * len(CHARS)), 'words': characters([c + 'x' for c in CHARS]),
            'asked': {'template': 'ask {instruction}\n'}, 'untemplated': {'template': 'no question'},
            'manylayers': args(n_layer=10**9), 'textversion': {'version': '1'}, 'listconfig': {'config': [1]},
            'texttokens': {'tokenizer': 'gpt2'}, 'numbertemplate': {'template': 5},
            'textiter': {'iter_num': 'x'}, 'numbername': {'model': {**good['model'], 5: torch.zeros(1)}},
            'sparse': {'model': {**good['model'], wte: good['model'][wte].to_sparse()}},
            'nodata': {'model': {**good['model'], wte: good['model'][wte].to('meta')}},
            'vectorloss': {'best_val_loss': torch.zeros(2)}, 'earlier': {'iter_num': -3},
            'textworse': {'n_worse': 'x'}, 'numberdata': {'config': {'dataset': 5}},
            'datanone': {'config': {'dataset': None}}, 'numberstart': {'config': {'init_from': 5}},
            'vectorprint': {'base_fingerprint': torch.zeros(2)},
            'listoption': {'config': {'dataset': 'chars', 'betas': (0.9, 0.95)}},
            'tensoroption': {'config': {'dropout': torch.zeros(2)}},
            'moments': {'optimizer': {'state': 3, 'param_groups': 'x'}, 'iter_num': 0},
            'trained': {'optimizer': {}}, 'hostile': {'optimizer': Hostile(str(root / 'ran'))}}.items():
        torch.save({**good, **changes}, root / f'{name}.pt')
    torch.save({'model': good['model'], 'model_args': good['model_args'], 'config': {'dataset': 'gone'}},
               root / 'gone.pt')
    torch.save(good['model'], root / 'bare.pt')
    torch.save([good], root / 'alist.pt')
    (root / 'cut.pt').write_bytes((root / 'good.pt').read_bytes()[:3000])
    (root / 'hostile_pickle.pt').write_bytes(pickle.dumps({'model': Hostile(str(root / 'ran'))}))
    for run, kept, name in (('run', 'ckpt', 'trained'), ('moments', 'last', 'moments'),
                            ('earlier', 'last', 'earlier'), ('hostile_last', 'last', 'hostile'),
                            ('hostile_best', 'ckpt', 'hostile')):
        (root / run).mkdir()
        shutil.copy(root / f'{name}.pt', root / run / f'{kept}.pt')
    adapted = GPT(GPTConfig(16, len(CHARS), 1, 1, 8))
    adapted.load_state_dict(good['model'])
    base = {'base': str(root / 'good.pt'), 'base_fingerprint': lora.fingerprint(adapted.parameters())}
    lora.add(adapted, 2, 4.0, 0.0, 'attn.c_attn')
    settings, matrices = lora.settings(adapted), lora.adapter(adapted)
    for name, changes in {
            'nobase': {'base': None}, 'gonebase': {'base': '/no/such'}, 'otherbase': {'base_fingerprint': 1},
            'rank': {'lora': {**settings, 'rank': 10**9}},
            'targets': {'lora': {**settings, 'targets': 'mlp.x'}},
            'norank': {'lora': {**settings, 'rank': 0}}, 'half': {'lora': {'rank': 2}}, 'none': {'lora': 5},
            'shape': {'model': {k: v[:1] for k, v in matrices.items()}},
            'text': {'model': {'transformer.h.0.attn.c_attn.lora_A': 'x'}}}.items():
        torch.save({**good, 'model': matrices, 'lora': settings, **base, **changes}, root / f'lora_{name}.pt')

FILES = { # a name, and what is in the file
    'typo.py': 'batchsize = 4', 'broken.py': 'batch_size = = 4', 'leaves.py': 'raise SystemExit(0)',
    'function.py': 'def batch_size(): return 4', 'huge.py': 'learning_rate = 10**400',
    'null.py': 'batch_size = 4 \0', 'endless.py': 'def f(): f()\nf()', 'nulls.py': "dataset = 'a\\0b'",
    'file': 'a file, not a folder', 'latin1.txt': 'café'.encode('latin-1'),
    'novel.txt.gz': gzip.compress(b'It was'), 'novel.pdf': b'%PDF-1.4\n\xe2\xe3',
    'picture.txt': b'\x89PNG\r\n\x1a\n\0\0', 'tiny.txt': 'a', 'blank.txt': ' \n', 'void.txt': '',
    'kanji.txt': '東京 ' * 50, 'text.txt': TEXT[:2000], 'pictures/a.jpg': b'',
    'template.txt': '{instruction.__class__} {0} %s',
    'half.jsonl': '{"text": "a"}\n{"text": ', 'list.jsonl': '["text"]', 'number.jsonl': '{"text": 5}',
    'deep.jsonl': '[' * 10**5, 'body.jsonl': '{"body": "a"}', 'word.jsonl': '{"text": "one"}',
    'columns.csv': 'id,body\n1,a\n', 'quote.csv': 'text\n"a\n', 'comma.csv': 'text,id\na,b,1\n',
    'label.jsonl': json.dumps({'ctx': 'a', 'endings': ['b', 'c', 'd', 'e'], 'label': 4}),
    'endings.jsonl': json.dumps({'ctx': 'a', 'endings': 'bcde', 'label': 1}),
    'noctx.jsonl': json.dumps({'endings': ['b', 'c', 'd', 'e'], 'label': 1}),
    'asked.jsonl': '{"instruction": "a", "output": "b"}\n' * 9,
    'one.jsonl': '{"instruction": "a", "output": "b"}', 'unanswered.jsonl': '{"instruction": "a"}\n' * 2,
    'role.jsonl': '{"messages": [{"role": "tool", "content": "a"}]}',
    'answers.jsonl': '{"messages": [{"role": "assistant", "content": "a"}]}',
    'export/mine.txt': 'mine', 'columns/log.csv': 'a,b\n1,2\n',
    'words/log.csv': 'iter,loss,train_loss,val_loss\nx,y,,\n',
    'binary/log.csv': bytes(range(256)), 'void/log.csv': '', 'rows.JSON': '[]',
    'long/log.csv': 'iter,loss,train_loss,val_loss\n"' + 'x' * 140_000 + '",,,\n',
    'trainer/checkpoint-1000/config.json': '{}', 'trainer/checkpoint-500/config.json': '{}',
    'peft/adapter_config.json': '{}', 'peft/adapter_model.safetensors': '',
    'hf/model.safetensors': '', 'hf/config.json': '{}',
    'drawn/log.csv': 'iter,loss,train_loss,val_loss\n0,4.5,4.5,4.5\n', 'drawn/loss.png/taken': ''}

def write_all(root, data):
    """ all of them: in the folder `root`, and as datasets in `data` """
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / 'nothing').mkdir()
    write_checkpoints(root)
    write_datasets(data, str(root / 'ran'))
    (root / 'tensorflow').mkdir()
    (root / 'tensorflow' / 'model.index').touch()
