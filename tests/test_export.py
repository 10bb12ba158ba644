"""
export.py as a user runs it; what it writes is read by transformers in a process that knows nothing of the
project.
"""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import lora
import saver
from conftest import CHARS, TEXT
from instruct import render
from model import GPT, GPTConfig
from tokenizer import from_state

STATES = {'char': {'name': 'char', 'chars': CHARS}, 'bpe': {'name': 'gpt2'}}
PROMPTS = {'char': 'def f(x):\n', 'bpe': "Hello,  world's"}
TEXTS = {'char': TEXT[:3000], 'bpe': TEXT[:3000] + " it 's . ok ,\n\n  x<|endoftext|>é 東京🙂\t\u0301 1234's"}
TEMPLATE = 'Q "{{}}" \\ é🙂\n{instruction}\n\nAbout {input}\n\nA:\n'
QUESTION = 'What is {input}?'
OUTSIDE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, task in json.load(sys.stdin).items():
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(folder).eval(),
                        AutoTokenizer.from_pretrained(folder))
    ids, prompt = tokenizer(task['text'])['input_ids'], tokenizer(task['prompt'], return_tensors='pt')
    with torch.no_grad():
        said = {'ids': ids, 'decoded': tokenizer.decode(ids),
                'logits': model(torch.tensor([ids[:32]])).logits,
                'asked': task['question'] and tokenizer.apply_chat_template(task['question'], tokenize=False),
                'greedy': tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])}
    torch.save(said, folder + '.pt')
"""

def logits(model, idx):
    """ of every position, by transformers' model or ours """
    with torch.no_grad():
        return model.eval().lm_head(model.hidden(idx)) if isinstance(model, GPT) else model.eval()(idx).logits

def write_run(path, kind):
    """ a checkpoint with an optimizer's state of a random model: characters without biases, or nanoGPT's
    padded BPE """
    torch.manual_seed(1)
    model = GPT(GPTConfig(32, len(CHARS) if kind == 'char' else 50304, 2, 2, 16, bias=kind == 'bpe'))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1 # so that no bias is zero, and the likeliest token is ahead
    moments = {i: {'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
               for i, p in enumerate(model.parameters())}
    template = {'template': TEMPLATE if kind == 'bpe' else None}
    saver.save({'model': model.state_dict(), 'model_args': checkpoints.model_args(model), 'iter_num': 7,
                      'best_val_loss': 1.5, 'config': {'dataset': 'chars'}, 'optimizer': {'state': moments},
                      'tokenizer': STATES[kind], **template}, str(path))
    return model

def test_transformers_read_an_export_with_no_code_of_ours_and_so_do_we(run, train, tmp_path):
    models = {kind: write_run(tmp_path / f'{kind}-run.pt', kind) for kind in STATES}
    for kind in STATES:
        out = run('export.py', f'--out_dir={tmp_path}/{kind}-run.pt', f'--to={tmp_path}/{kind}').out
        assert (('written as zeros' in out) == (kind == 'char')
                and ('50,304 ids, its tokenizer 50,257' in out) == (kind == 'bpe'))
        assert (f'next: python sample.py --init_from={tmp_path}/{kind}'
                f'{" --instruction=TEXT" * (kind == "bpe")}\n') in out
        weights, config = (tmp_path / kind / name for name in ('model.safetensors', 'config.json'))
        assert weights.stat().st_mode == config.stat().st_mode # for those who may read the folder
    questions = {'char': None, 'bpe': [{'role': 'user', 'content': text} for text in ('Look:', QUESTION)]}
    questions['bpe'] += [{'role': 'assistant', 'content': 'That.'}, questions['bpe'][1]]
    tasks = {f'{tmp_path}/{kind}': {'text': TEXTS[kind], 'prompt': PROMPTS[kind], 'question': questions[kind]}
             for kind in STATES}
    done = subprocess.run([sys.executable, '-c', OUTSIDE], input=json.dumps(tasks), cwd=tmp_path,
                          encoding='utf-8', env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': ''},
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    for kind, model in models.items():
        said, tokenizer = torch.load(tmp_path / f'{kind}.pt'), from_state(STATES[kind])
        assert said['ids'] == tokenizer.encode(TEXTS[kind], allow_special=True)
        assert said['decoded'] == TEXTS[kind]
        idx = torch.tensor([said['ids'][:32]])
        torch.testing.assert_close(said['logits'], logits(model, idx)[..., :tokenizer.n_vocab],
                                   atol=1e-4, rtol=0)
        again, beside = checkpoints.load_model(f'{tmp_path}/{kind}')
        assert beside == {'tokenizer': STATES[kind], **({'template': TEMPLATE} if kind == 'bpe' else {})}
        torch.testing.assert_close(logits(again, idx), logits(model, idx)[..., :tokenizer.n_vocab],
                                   atol=1e-6, rtol=0)
        source = f'--out_dir={tmp_path}/char-run.pt' if kind == 'char' else f'--init_from={tmp_path}/bpe'
        sample = run('sample.py', source, f'--start={PROMPTS[kind]}', '--temperature=0',
                     '--max_new_tokens=12', '--num_samples=1', '--device=cpu', '--dtype=float32').out
        assert sample == said['greedy'] + '\n---------------\n' and len(said['greedy']) > len(PROMPTS[kind])
    assert said['asked'] == (render(TEMPLATE, f'Look:\n\n{QUESTION}') + 'That.<|endoftext|>'
                             + render(TEMPLATE, QUESTION))
    config = json.load(open(tmp_path / 'bpe' / 'config.json'))
    assert (config['n_positions'], config['vocab_size'], config['eos_token_id']) == (32, 50257, 50256)
    assert config['architectures'] == ['GPT2LMHeadModel'] and config['activation_function'] == 'gelu_new'
    trained = train(f'--init_from={tmp_path}/char', '--learning_rate=0', '--min_lr=0', '--max_iters=1')
    last, _ = checkpoints.load_model(str(trained.out_dir / 'last.pt'))
    assert torch.equal(last.transformer.wte.weight, models['char'].transformer.wte.weight)

@pytest.fixture(scope='module')
def char_run(tmp_path_factory):
    path = tmp_path_factory.mktemp('export') / 'run.pt'
    return write_run(path, 'char'), path

def test_weights_only_is_nanogpt_s_checkpoint_without_the_optimizer(run, char_run, tmp_path):
    model, path = char_run
    run('export.py', f'--out_dir={path}', '--weights_only=True', f'--to={tmp_path}/new/small.pt',
        '--dtype=float16')
    small = torch.load(tmp_path / 'new' / 'small.pt', weights_only=True)
    assert set(small) == {'model', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer',
                          'version'} # a run from scratch has no base
    assert (small['iter_num'], small['best_val_loss'], small['config']) == (7, 1.5, {'dataset': 'chars'})
    assert set(small['model_args']) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size',
                                        'dropout'}
    assert small['model'].keys() == model.state_dict().keys()
    assert all(torch.equal(small['model'][name], tensor.half())
               for name, tensor in model.state_dict().items())
    whole, exported = os.path.getsize(path), os.path.getsize(tmp_path / 'new' / 'small.pt')
    # two moments of four bytes, and half of the weights
    assert exported < whole - 10 * model.num_params() * 0.95
    again, beside = checkpoints.load_model(str(tmp_path / 'new' / 'small.pt'))
    assert again.config == model.config and beside['tokenizer'] == STATES['char']

# -----------------------------------------------------------------------------
# adapters

def write_adapted(path, hf_dir):
    """ a checkpoint of LoRA, as train.py writes it, on the base in hf_dir """
    model = GPT.from_pretrained(str(hf_dir))
    base = checkpoints.describe_base(str(hf_dir), model, True, {})
    torch.manual_seed(5)
    lora.add(model, 4, 10.0, 0.1, 'attn.c_attn,mlp.c_proj')
    for linear in lora.layers(model):
        torch.nn.init.normal_(linear.lora_B, std=0.5)
    saver.save({**checkpoints.adapter_state(model), **base, 'model_args': checkpoints.model_args(model),
                      'tokenizer': STATES['bpe']}, str(path))

def test_an_adapter_has_peft_s_layout_and_an_overwrite_leaves_nothing_of_the_old(run, hf_dir, tmp_path):
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel
    write_adapted(tmp_path / 'lora.pt', hf_dir)
    (tmp_path / 'peft').mkdir()
    (tmp_path / 'peft' / 'model.safetensors').write_bytes(b'of an earlier export')
    run('export.py', f'--out_dir={tmp_path}/lora.pt', '--adapter=True', f'--to={tmp_path}/peft',
        '--overwrite=True')
    assert sorted(os.listdir(tmp_path / 'peft')) == ['adapter_config.json', 'adapter_model.safetensors']
    assert sorted(os.listdir(tmp_path)) == ['lora.pt', 'peft']
    assert json.load(open(tmp_path / 'peft' / 'adapter_config.json')) == {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': str(hf_dir), 'r': 4,
        'lora_alpha': 10.0, 'lora_dropout': 0.1, 'target_modules': ['attn.c_attn', 'mlp.c_proj'],
        'fan_in_fan_out': True, 'bias': 'none', 'inference_mode': True}
    tensors = load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
    places = [f'base_model.model.transformer.h.{i}.{name}'
              for i in range(2) for name in ('attn.c_attn', 'mlp.c_proj')]
    assert tensors.keys() == {f'{place}.lora_{part}.weight' for place in places for part in 'AB'}
    theirs = GPT2LMHeadModel.from_pretrained(hf_dir)
    with torch.no_grad():
        for place in places: # what PEFT computes, put into the weights of a Conv1D, (in, out)
            A, B = tensors[f'{place}.lora_A.weight'], tensors[f'{place}.lora_B.weight']
            theirs.get_parameter(place.removeprefix('base_model.model.') + '.weight').add_(
                10 / 4 * (B @ A).t())
    merged, _ = checkpoints.load_model(str(tmp_path / 'lora.pt'))
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(logits(theirs, idx), logits(merged, idx), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(GPT2LMHeadModel.from_pretrained(hf_dir), idx), logits(merged, idx),
                              atol=1e-2)

def test_peft_loads_an_adapter(run, hf_dir, tmp_path):
    import peft # here, since it takes long
    from transformers import GPT2LMHeadModel
    write_adapted(tmp_path / 'lora.pt', hf_dir)
    run('export.py', f'--out_dir={tmp_path}/lora.pt', '--adapter=True', f'--to={tmp_path}/peft')
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(hf_dir), str(tmp_path / 'peft'))
    merged, _ = checkpoints.load_model(str(tmp_path / 'lora.pt'))
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(logits(theirs, idx), logits(merged, idx), atol=1e-5, rtol=0)

# -----------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize('options, message', [
    ('', 'type --to=FOLDER'),
    ('--to={root}/full', 'type --overwrite=True'),
    ('--to={root}/full --overwrite=True', 'holds mine.txt, which no export wrote'),
    ('--to={root}/full --weights_only=True --overwrite=True', 'is a folder'),
    ('--to={root}/theirs --overwrite=True', 'holds tsconfig.json, which no export wrote'),
    ('--to={root}/file.pt', 'but a folder is written'),
    ('--to={root}/file.pt --weights_only=True', 'type --overwrite=True'),
    ('--to={root}/new --weights_only=True --adapter=True', 'type one of them'),
    ('--to={root}/new --dtype=int8', "dtype is 'int8'"),
    ('--to={root}/new --adapter=True', 'holds no adapter'),
    ('--to={root}/new --out_dir={root}/none', 'there is no checkpoint in'),
])
def test_an_export_that_cannot_be_is_told_and_touches_nothing(run, char_run, tmp_path, options, message):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine.txt').write_text('mine')
    (tmp_path / 'file.pt').write_text('mine, too')
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'tsconfig.json').touch()
    done = run('export.py', f'--out_dir={char_run[1]}', *options.format(root=tmp_path).split(), status=2)
    assert message in done.err.splitlines()[-1] and 'Traceback' not in done.err
    assert (sorted(os.listdir(tmp_path)) == ['file.pt', 'full', 'theirs']
            and os.listdir(tmp_path / 'full') == ['mine.txt'])
    assert os.listdir(tmp_path / 'theirs') == ['tsconfig.json']
    assert (tmp_path / 'file.pt').read_text() == 'mine, too'

def test_an_export_that_replaces_another_leaves_the_folders_beside_it(run, char_run, tmp_path):
    for name in ('hf.old', 'hf.tmp'):
        (tmp_path / name).mkdir()
    for options in ((), ('--overwrite=True', '--dtype=bfloat16')):
        run('export.py', f'--out_dir={char_run[1]}', f'--to={tmp_path}/hf', *options)
    assert sorted(os.listdir(tmp_path)) == ['hf', 'hf.old', 'hf.tmp']
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['dtype'] == 'bfloat16'

def test_an_export_that_is_stopped_while_it_takes_the_old_one_s_place_leaves_that(run, char_run, tmp_path):
    run('export.py', f'--out_dir={char_run[1]}', f'--to={tmp_path}/hf')
    for name in ('rename', 'replace'): # stopped right after the first, or instead of the second
        (tmp_path / 'stop.py').write_text(
            f"import os\ndef _stop(a, b, _move=os.{name}):\n    if b.endswith(('old', 'hf')):\n"
            f"        {'_move(a, b)' if name == 'rename' else 'pass'}\n        os.{name} = _move\n"
            f"        raise KeyboardInterrupt\n    _move(a, b)\nos.{name} = _stop\n")
        run('export.py', tmp_path / 'stop.py', f'--out_dir={char_run[1]}', f'--to={tmp_path}/hf',
            '--overwrite=True', status=130)
        assert (sorted(os.listdir(tmp_path)) == ['hf', 'stop.py']
                and (tmp_path / 'hf' / 'config.json').exists()), name

def test_a_disk_that_fills_up_leaves_no_part_of_an_export(run, char_run, tmp_path):
    """ a limit on the size of files stands in for a full disk """
    limit = ("import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
             "del sys.argv[0]; sys.path.insert(0, '.'); "
             "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); "
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run('export.py', f'--out_dir={char_run[1]}', '--weights_only=True', f'--to={tmp_path}/small.pt',
               launch=('-c', limit), status=2)
    assert 'no part of it was left there' in done.err.splitlines()[-1] and os.listdir(tmp_path) == []

# -----------------------------------------------------------------------------
# TensorFlow's checkpoints

class Reader:
    """ stands in for tf.train.load_checkpoint's, over OpenAI's names and shapes in an .npz """
    def __init__(self, prefix):
        self.arrays = np.load(prefix + '.npz')

    def get_variable_to_shape_map(self):
        return {name: list(self.arrays[name].shape) for name in self.arrays}

    def get_tensor(self, name):
        return self.arrays[name]

def write_tensorflow(folder, hf_dir):
    """ transformers' weights as OpenAI's variables, in a folder as gpt-2-simple leaves it """
    from transformers import GPT2LMHeadModel
    theirs = GPT2LMHeadModel.from_pretrained(hf_dir)
    arrays = {'model/wte/Adam': np.zeros(3)} # the optimizer's, which is passed over
    for name, tensor in theirs.transformer.state_dict().items():
        name = name.replace('h.0.', 'h0.').replace('h.1.', 'h1.').replace('.', '/')
        if 'ln_' in name:
            name = name.replace('weight', 'g').replace('bias', 'b')
        elif name.endswith('weight') and name[0] == 'h':
            name, tensor = name.replace('weight', 'w'), tensor[None] # (1, in, out)
        arrays['model/' + name.removesuffix('/weight').replace('bias', 'b')] = tensor.numpy()
    folder.mkdir()
    # the last is the latest on the disk
    for prefix, scale in (('model-900', 0), ('model-1000', 1), ('model-950', 0)):
        np.savez(folder / f'{prefix}.npz', **{name: array * scale for name, array in arrays.items()})
        (folder / f'{prefix}.index').touch()
    (folder / 'checkpoint').write_text('model_checkpoint_path: "/content/checkpoint/run1/model-1000"\n'
                                       'all_model_checkpoint_paths: "/content/checkpoint/run1/model-900"\n')
    (folder / 'hparams.json').write_text(
        '{"n_vocab": 50257, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}')
    return theirs

@pytest.mark.parametrize('source', ['', 'model-1000', 'model-1000.index'])
def test_a_tensorflow_checkpoint_computes_what_transformers_do(monkeypatch, hf_dir, tmp_path, source):
    theirs = write_tensorflow(tmp_path / 'run1', hf_dir)
    monkeypatch.setitem(sys.modules, 'tensorflow',
                        SimpleNamespace(train=SimpleNamespace(load_checkpoint=Reader)))
    model, beside = checkpoints.load_model(os.path.join(tmp_path, 'run1', source))
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(logits(model, idx), logits(theirs, idx), atol=1e-5, rtol=0)
    assert beside == {'tokenizer': {'name': 'gpt2'}} and model.lm_head.weight is model.transformer.wte.weight

def test_a_tensorflow_checkpoint_without_tensorflow_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    (tmp_path / 'model.ckpt.index').touch()
    with pytest.raises(ImportError, match='is not installed; type pip install tensorflow'):
        checkpoints.load_model(str(tmp_path))

def test_transformers_are_told_of_the_folder_that_a_base_is_to_be_exported_to(run, tmp_path):
    model = GPT(GPTConfig(16, len(CHARS), 1, 1, 8))
    base = tmp_path / 'base' / 'ckpt.pt'
    base.parent.mkdir()
    saver.save({'model': model.state_dict(), 'model_args': checkpoints.model_args(model)}, str(base))
    lora.add(model, 2, 4.0, 0.0, 'attn.c_attn')
    saver.save({**checkpoints.adapter_state(model), 'base': str(base),
                'model_args': checkpoints.model_args(model)}, str(tmp_path / 'lora.pt'))
    out = run('export.py', f'--out_dir={tmp_path}/lora.pt', '--adapter=True', f'--to={tmp_path}/peft').out
    assert f'next: python export.py --init_from={base} --to=FOLDER\n' in out
    assert "AutoModelForCausalLM.from_pretrained('FOLDER')" in out
