"""
docs/security.md: what may be hostile runs nothing, what is pinned is what is loaded, and nobody calls home.
"""
import ast
import glob
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import checkpoint as checkpoints
import lora
import pretrained
import saver
from conftest import CHARS, ROOT, TEXT, TINY
from instruct import render
from model import GPT, GPTConfig
from test_dataset import Hostile

SCRIPTS = sorted(glob.glob(os.path.join(ROOT, '*.py'))
                 + glob.glob(os.path.join(ROOT, 'data', '*', 'prepare.py')))

# -----------------------------------------------------------------------------
# models that others wrote

@pytest.fixture
def altered(hf_dir, tmp_path):
    """ a copy of the tiny GPT-2 with other files in it, and other settings in its config.json """
    def altered(settings=None, **files):
        folder = tmp_path / 'altered'
        shutil.copytree(hf_dir, folder)
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({**config, **(settings or {})}))
        for name, content in files.items():
            (folder / name.replace('__', '.')).write_text(content)
        return folder
    return altered

def code_that_marks(marker):
    return f"import os\nos.mkdir({str(marker)!r})\nclass Config: pass\nclass Model: pass\n"

def test_weights_that_would_run_code_do_not(altered, tmp_path):
    folder, marker = altered(), tmp_path / 'ran'
    os.remove(folder / 'model.safetensors')
    torch.save({'transformer.wte.weight': Hostile(str(marker))}, folder / 'pytorch_model.bin')
    with pytest.raises(OSError, match='Weights only load failed|Unable to load weights'):
        checkpoints.load_model(str(folder))
    assert not marker.exists()
    torch.load(folder / 'pytorch_model.bin', weights_only=False)
    assert marker.exists() # so that it was hostile

AUTO_MAP = {'auto_map': {'AutoConfig': 'code.Config', 'AutoModelForCausalLM': 'code.Model'}}

def test_code_beside_a_model_does_not_run_and_nobody_is_asked(altered, tmp_path, monkeypatch):
    monkeypatch.setattr('builtins.input', lambda *args: pytest.fail('transformers asked whether to run it'))
    marker = tmp_path / 'ran'
    folder = altered({**AUTO_MAP, 'model_type': 'mine'}, code__py=code_that_marks(marker))
    with pytest.raises(OSError, match='custom code'):
        checkpoints.load_model(str(folder))
    assert not marker.exists()

def test_a_gpt2_that_brings_code_loads_without_it(altered, hf_dir, tmp_path):
    marker = tmp_path / 'ran'
    folder = altered(AUTO_MAP, code__py=code_that_marks(marker), tokenizer_config__json=json.dumps(
        {'auto_map': {'AutoTokenizer': ['code.Tokenizer', None]}}))
    model, whole = (checkpoints.load_model(str(place))[0] for place in (folder, hf_dir))
    assert torch.equal(model.transformer.wpe.weight, whole.transformer.wpe.weight) and not marker.exists()

def test_a_kernel_of_the_hub_that_a_model_names_is_not_fetched(altered):
    from transformers import GPT2LMHeadModel
    folder = altered({'attn_implementation': 'owner/kernel', '_attn_implementation': 'owner/kernel'})
    with pytest.raises(Exception, match='kernels'): # what transformers would do with it
        GPT2LMHeadModel.from_pretrained(folder)
    checkpoints.load_model(str(folder))

JUNK = ['junk', '', '[1]', '5', 'null', '{}', '{"model": 5}',
        '{"model": {"type": "WordLevel", "vocab": {"a": "x", "b": 1}}}',
        '{"model": {"type": "BPE", "vocab": [1]}}', '{"model": {"type": "WordLevel", "vocab": 5}}',
        '[' * 10**5]

@pytest.mark.parametrize('junk', JUNK, ids=[junk[:60] for junk in JUNK])
def test_a_tokenizer_that_is_junk_is_told_in_one_error(altered, junk):
    with pytest.raises(OSError, match="from Hugging Face's format or hub"):
        pretrained.load(str(altered(tokenizer__json=junk)))

@pytest.mark.parametrize('settings', [
    {'n_layer': 'x'}, {'n_head': 3}, {'model_type': 'bert'}, {'activation_function': 'relu'},
    {'n_embd': -1}, {'n_layer': 0}, {'vocab_size': 10**15}], ids=str)
def test_a_config_that_is_wrong_is_told_in_one_error(altered, settings):
    with pytest.raises(OSError, match="from Hugging Face's format or hub"):
        pretrained.load(str(altered(settings)))

def test_a_template_reaches_no_attribute():
    attack = '{instruction.__class__} {0} %s {instruction!r} {instruction}'
    assert render(attack, '{input.__init__} %(x)s') == (
        '{instruction.__class__} {0} %s {instruction!r} {input.__init__} %(x)s')

# -----------------------------------------------------------------------------
# a pinned revision

SHAS = {'main': 'a' * 40, 'old': 'b' * 40}
LOAD = """
import json, sys
import checkpoint
for source in sys.argv[1:]:
    try:
        print(json.dumps([source, checkpoint.load_model(source)[0].transformer.wpe.weight[0, 0].item()]))
    except OSError as error:
        print(json.dumps([source, str(error).partition(' (')[0]]))
"""

def write_cache(home, hf_dir):
    """ the hub's cache as huggingface_hub fills it, with two commits of owner/tiny that differ by a
    number """
    from transformers import GPT2LMHeadModel
    repo, model = home / 'hub' / 'models--owner--tiny', GPT2LMHeadModel.from_pretrained(hf_dir)
    (repo / 'refs').mkdir(parents=True)
    for value, (ref, sha) in enumerate(SHAS.items(), 1):
        (repo / 'refs' / ref).write_text(sha)
        model.transformer.wpe.weight.data[0, 0] = value
        model.save_pretrained(repo / 'snapshots' / sha)

def test_a_pinned_revision_is_the_one_that_is_loaded_also_for_an_adapter(hf_dir, tmp_path):
    write_cache(tmp_path, hf_dir)
    folder = tmp_path / 'owner' / 'tiny@2' # a path that has an @ of its own
    shutil.copytree(tmp_path / 'hub' / 'models--owner--tiny' / 'snapshots' / SHAS['old'], folder)
    model, _ = checkpoints.load_model(str(folder))
    pinned = f"owner/tiny@{SHAS['old']}"
    base = checkpoints.describe_base(pinned, model, True, {})
    assert base['base'] == pinned
    lora.add(model, 2, 4.0, 0.0, 'attn.c_attn')
    saver.save({**checkpoints.adapter_state(model), **base, 'model_args': checkpoints.model_args(model),
                      'tokenizer': {'name': 'gpt2'}}, str(tmp_path / 'lora.pt'))
    sources = {'owner/tiny': 1, 'owner/tiny@main': 1, pinned: 2, 'owner/tiny@old': 2,
               str(tmp_path / 'lora.pt'): 2, str(folder): 2,
               'owner/tiny@none': "cannot load owner/tiny@none from Hugging Face's format or hub"}
    env = {**os.environ, 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': ROOT}
    done = subprocess.run([sys.executable, '-c', LOAD, *sources], env=env, cwd=tmp_path,
                          capture_output=True, encoding='utf-8')
    assert dict(map(json.loads, done.stdout.splitlines())) == sources, done.stderr

def test_a_revision_stands_behind_a_name_of_the_hub_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out@2').mkdir()
    for source, expected in {
            'gpt2@607a30d': ('gpt2', '607a30d'), 'owner/name@refs/pr/1': ('owner/name', 'refs/pr/1'),
            'owner/name': ('owner/name', None), 'out@2': ('out@2', None),
            '/runs/a@b/ckpt.pt': ('/runs/a@b/ckpt.pt', None), 'gpt2@': ('gpt2@', None)}.items():
        assert pretrained.split_revision(source) == expected
    # which needs no owner, as gpt2 does not
    assert pretrained.find_hugging_face('distilgpt2') == ('distilgpt2', 'main')

def test_an_exported_adapter_names_the_revision_of_its_base(run, tmp_path):
    model = GPT(GPTConfig(16, len(CHARS), 1, 1, 8))
    lora.add(model, 2, 4.0, 0.0, 'attn.c_attn')
    saver.save({**checkpoints.adapter_state(model), 'base': 'owner/tiny@old',
                      'model_args': checkpoints.model_args(model)}, str(tmp_path / 'lora.pt'))
    done = run('export.py', f'--out_dir={tmp_path}/lora.pt', '--adapter=True', f'--to={tmp_path}/peft')
    settings = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert (settings['base_model_name_or_path'], settings['revision']) == ('owner/tiny', 'old')
    assert "AutoModelForCausalLM.from_pretrained('owner/tiny', revision='old')" in done.out

# -----------------------------------------------------------------------------
# the network

FORBIDDEN = """
import os, runpy, shlex, socket, sys
def refuse(*args, **kwargs):
    open(marker, 'w').close()
    os._exit(9)
for name in ('connect', 'connect_ex', 'sendto', 'sendmsg'):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
marker, commands = sys.argv[1], sys.argv[2:]
sys.path.insert(0, '.')
for command in commands:
    sys.argv = shlex.split(command)
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as leaving:
        assert not leaving.code, command
    assert not os.path.exists(marker), command
    print('done without the network:', sys.argv[0], flush=True)
"""

def test_nothing_is_fetched_that_was_not_asked_for(clone, hf_dir, tmp_path):
    """ the scripts, one after the other in a Python whose sockets leave a marker and end it """
    (tmp_path / 'novel.txt').write_text(TEXT, encoding='utf-8')
    quick = ' '.join((*TINY, '--max_iters=2', '--eval_interval=2'))
    out, tuned, cpu = tmp_path / 'scratch', tmp_path / 'tuned', '--device=cpu --dtype=float32'
    commands = (
        f'data/custom/prepare.py --input={tmp_path}/novel.txt --name=offline',
        f'train.py --dataset=offline {quick} --out_dir={out}',
        f'train.py --dataset=offline {quick} --init_from={hf_dir} --out_dir={tuned}',
        f'sample.py --out_dir={tuned} --max_new_tokens=3 --num_samples=1 {cpu}',
        f'evaluate.py --out_dir={tuned} --limit=40 {cpu}', # beside its base
        f'export.py --out_dir={out} --to={tmp_path}/exported',
        f'sample.py --init_from={tmp_path}/exported --max_new_tokens=3 --num_samples=1 {cpu}',
        f'plot.py {out} {tuned}',
        'sample.py --init_from=gpt2 --device=cpu') # which does ask for it, and shows that the sockets tell
    env = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
    done = subprocess.run([sys.executable, '-c', FORBIDDEN, str(tmp_path / 'called'), *commands], cwd=clone,
                          env={**env, 'HF_HOME': str(tmp_path / 'home')}, capture_output=True,
                          encoding='utf-8', timeout=120)
    assert done.stdout.count('done without the network') == len(commands) - 1, done.stderr
    assert done.returncode == 9 and (tmp_path / 'called').exists()

NETWORK = { # which of our files import what may call out
    'requests': ['publish.py'], 'datasets': ['documents.py'], 'wandb': ['log.py'], 'huggingface_hub': [],
    'urllib': [], 'http': [], 'httpx': [], 'ftplib': [], 'smtplib': []}

def imports(tree):
    """ the packages that a file imports, anywhere in it """
    for node in ast.walk(tree):
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else [])
        yield from (name.split('.')[0] for name in names)

def test_the_files_that_call_out_are_those_that_the_page_names():
    trees = {os.path.relpath(path, ROOT): ast.parse(open(path, encoding='utf-8').read()) for path in SCRIPTS}
    for package, files in NETWORK.items():
        assert [path for path, tree in trees.items() if package in imports(tree)] == files, package
    with open(os.path.join(ROOT, 'docs', 'security.md'), encoding='utf-8') as file:
        page = file.read()
    assert all(f'`{name}`' in page for files in NETWORK.values() for name in files)

def test_nothing_of_ours_reads_a_pickle_or_runs_a_text_but_where_the_page_says():
    for path in SCRIPTS:
        name, source = os.path.relpath(path, ROOT), open(path, encoding='utf-8').read()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ('eval', 'pickle.load', 'pickle.loads', 'os.system', 'os.popen'), (
                name, node.lineno)
            assert called != 'torch.load' or given.get('weights_only') == 'True', (name, node.lineno)
            assert called != 'exec' or name in ('configurator.py', 'bench.py', 'advice.py'), (
                name, node.lineno)
            assert (given.get('trust_remote_code', 'False') == 'False'
                    and 'shell' not in given), (name, node.lineno)
