"""
What a user has is never lost to a new run, an export or a dataset: models that adapters need, and others'
files.
"""
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import checkpoint as checkpoints
import lora
from checkpoint import config_of, load, load_model
from model import GPTConfig

def test_the_base_of_an_adapter_is_not_written_over(train, run, tmp_path):
    base, adapter = train(out_dir='base').out_dir, tmp_path / 'adapter'
    train(f'--init_from={base}', '--lora_rank=2', out_dir='adapter')
    for options in ((), ('--lora_rank=2',)): # also where the adapter alone is named
        error = train(f'--init_from={adapter}', *options, '--overwrite=True', out_dir='base', status=2).err
        assert 'or what it is an adapter for, is out_dir or lies in it' in error
    hub = tmp_path / 'model' # and where the base is a folder of Hugging Face's
    run('export.py', f'--out_dir={base}', f'--to={hub}')
    train(f'--init_from={hub}', '--lora_rank=2', out_dir='second')
    error = run('export.py', f"--out_dir={tmp_path / 'second'}", f'--to={hub}', '--overwrite=True',
                status=2).err
    assert 'what that is an adapter for' in error
    for name in ('adapter', 'second'):
        run('sample.py', f'--out_dir={tmp_path / name}', '--num_samples=1', '--max_new_tokens=4',
            '--device=cpu')

@pytest.mark.parametrize('options', [(), ('--lora_rank=2',)])
def test_a_run_whose_folder_has_moved_with_its_base_s_is_evaluated_beside_it(train, run, tmp_path, options):
    train(out_dir='old/base')
    train(f"--init_from={tmp_path / 'old' / 'base'}", *options, '--max_iters=1', out_dir='old/tuned')
    (tmp_path / 'old').rename(tmp_path / 'new')
    (tmp_path / 'link').symlink_to(tmp_path / 'new' / 'tuned')
    run('export.py', f"--out_dir={tmp_path / 'link'}", '--weights_only=True', f"--to={tmp_path / 'small.pt'}")
    for source in ('new/tuned', 'link', 'small.pt'):
        told = run('evaluate.py', f'--init_from={tmp_path / source}', '--dataset=chars', '--device=cpu')
        assert told.out.splitlines()[3].split()[0].startswith(str(tmp_path / 'new' / 'base'))
        assert 'no comparison with its base' not in told.out + told.err

@pytest.mark.parametrize('options', [(), ('--lora_rank=2',)])
def test_an_adapter_that_is_a_base_is_known_by_itself_and_not_by_what_it_is_merged_to(
        train, run, tmp_path, options):
    train(out_dir='base')
    train(f"--init_from={tmp_path / 'base'}", '--lora_rank=2', out_dir='adapter')
    train(f"--init_from={tmp_path / 'adapter'}", *options, '--max_iters=1', out_dir='tuned')
    model, loaded = load_model(str(tmp_path / 'adapter'))
    tuned = checkpoints.load(str(tmp_path / 'tuned' / 'ckpt.pt'))
    assert lora.is_base(model, loaded, tuned) and lora.is_base(model, {}, tuned)
    # as another machine's sums may differ, if far less
    model.transformer.h[0].attn.c_attn.weight.data *= 1.0001
    assert lora.is_base(model, loaded, tuned) and not lora.is_base(model, {}, tuned)
    assert not lora.is_base(model, {'fingerprint': 1}, tuned) # another adapter
    small = tmp_path / 'small.pt' # an exported checkpoint knows it, too
    run('export.py', f"--out_dir={tmp_path / 'tuned'}", '--weights_only=True', f'--to={small}')
    train(f"--init_from={tmp_path / 'base'}", '--lora_rank=2', '--seed=5', '--overwrite=True',
          out_dir='adapter')
    assert 'is no longer the model that' in run('evaluate.py', f'--init_from={small}', '--dataset=chars',
                                                '--device=cpu').err

def test_a_run_is_compared_with_the_base_it_had_from_any_folder_or_with_none(train, run, clone, tmp_path):
    train(out_dir='base')
    train(f"--init_from={os.path.relpath(tmp_path / 'base', clone)}", '--max_iters=1', out_dir='tuned')
    evaluate = 'evaluate.py', f"--out_dir={tmp_path / 'tuned'}", '--dataset=chars', '--device=cpu'
    told = subprocess.run([sys.executable, clone / evaluate[0], *evaluate[1:]], cwd=tmp_path,
                          capture_output=True, encoding='utf-8')
    assert told.stdout.splitlines()[3].split()[0] == 'base' and 'no comparison' not in told.stderr
    train('--overwrite=True', '--seed=2', out_dir='base')
    assert (f"{tmp_path / 'base'} is no longer the model that {tmp_path / 'tuned'} was trained from"
            in run(*evaluate).err)
    assert len(run(*evaluate, f"--base={tmp_path / 'base'}").out.splitlines()) == 5
    (tmp_path / 'base').rename(tmp_path / 'gone')
    assert f"no comparison with its base: there is no model '{tmp_path / 'base'}'" in run(*evaluate).err
    # no adapter needs it
    train(f"--init_from={tmp_path / 'tuned'}", '--max_iters=1', '--overwrite=True', out_dir='base')

def test_a_base_in_a_folder_called_scratch_is_compared_with(train, clone, tmp_path):
    train(out_dir='scratch')
    train(f"--init_from={tmp_path / 'scratch'}", '--max_iters=1', out_dir='tuned')
    told = subprocess.run(
        [sys.executable, clone / 'evaluate.py', '--out_dir=tuned', '--dataset=chars', '--device=cpu'],
        cwd=tmp_path, capture_output=True, encoding='utf-8')
    assert [line.split()[0] for line in told.stdout.splitlines()[2:]] == ['tuned', 'scratch', 'difference']

@pytest.mark.parametrize('name', ['log.csv', 'report.md', 'loss.png'])
def test_a_file_of_the_user_s_is_not_written_over_by_a_run(train, tmp_path, name):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / name).write_text('mine')
    for options in ((), ('--overwrite=True',)):
        assert f'{name} is not of train.py' in train(*options, out_dir='mine', status=2).err
    assert (tmp_path / 'mine' / name).read_text() == 'mine'

def test_a_template_txt_that_is_a_text_outlives_the_dataset_made_beside_it(clone, run):
    folder = clone / 'data' / 'letters'
    folder.mkdir()
    for name in ('one.txt', 'template.txt'):
        (folder / name).write_text('dear all, ' * 40)
    run('data/custom/prepare.py', f'--input={folder}', '--name=letters', '--tokenizer=char')
    assert {'one.txt', 'template.txt', 'train.bin'} <= set(os.listdir(folder))
    shutil.rmtree(folder)

def test_a_model_in_a_folder_of_a_size_s_name_is_the_one_that_is_planned_for(hf_dir, tmp_path, monkeypatch):
    shutil.copytree(hf_dir, tmp_path / 'gpt2')
    monkeypatch.chdir(tmp_path)
    assert config_of('gpt2', '', asdict(GPTConfig())) == load_model('gpt2')[0].config

def test_a_loaded_model_s_shape_is_told_where_another_was_typed(run, train, tmp_path):
    told = 'warning: a loaded model keeps its shape'
    assert told not in train('--n_layer=1', '--n_embd=8').out
    assert told not in train('--n_layer=1', '--n_embd=8', '--init_from=resume', '--max_iters=8').out
    assert f'{told}: n_layer stays 1, not 3' in train('--n_layer=3', '--n_embd=8', '--init_from=resume',
                                                      '--max_iters=9').out
    later = train(f"--init_from={tmp_path / 'out'}", '--bias=True', '--dry_run=True', out_dir='later')
    assert (f'{told}: n_layer stays 1, not 2; n_embd stays 8, not 16; bias stays False, not True\n'
            in later.out)
    # which would not divide n_embd
    odd = train(f"--init_from={tmp_path / 'out'}", '--n_head=5', out_dir='odd')
    assert 'n_head stays 2, not 5' in odd.out
    assert 'finished at iteration 8' in run('train.py', '--init_from=resume', '--max_iters=8',
                                            out_dir='odd').out

def test_a_latest_checkpoint_whose_sizes_are_no_sizes_leaves_the_best_to_go_on_from(train, tmp_path):
    train()
    latest = torch.load(tmp_path / 'out' / 'last.pt')
    (tmp_path / 'out' / 'last.pt').unlink()
    torch.save({**latest, 'model_args': {**latest['model_args'], 'n_embd': 16.0}},
               tmp_path / 'out' / 'last.pt')
    assert 'going on from' in train('--init_from=resume', '--max_iters=8').out

def test_a_best_that_could_not_be_saved_is_not_told_to_be_the_best(train, tmp_path):
    (tmp_path / 'spy.py').write_text(
        "import saver\n_save = saver.save\ndef _full(c, path):\n    if c['iter_num'] == 6:\n"
        "        raise OSError('full')\n    _save(c, path)\nsaver.save = _full\n")
    done = train(tmp_path / 'spy.py')
    assert ('best val loss' in done.out and ', at iteration 4: ' in done.out
            and 'could not be saved' in done.out)
    assert load(done.out_dir / 'ckpt.pt')['iter_num'] == 4

def test_a_run_that_is_resumed_keeps_its_checkpoints_whatever_is_typed(train):
    train('--keep_checkpoints=True')
    result = train('--init_from=resume', '--overwrite=True', '--max_iters=8', '--keep_checkpoints=True')
    assert ((result.out_dir / 'iter_000000.pt').exists()
            and result.column('iter') == [str(i) for i in range(9)])

def test_processes_that_would_resume_at_different_iterations_are_told(train, tmp_path):
    train('--max_iters=2')
    (tmp_path / 'spy.py').write_text( # as where each node has a folder of its own
        "import checkpoint, os\n_resume = checkpoint.resume\ndef _own(*args):\n"
        "    model, loaded = _resume(*args)\n"
        "    return model, {**loaded, 'iter_num': 2 - int(os.environ['RANK'])}\ncheckpoint.resume = _own\n")
    done = train(tmp_path / 'spy.py', '--init_from=resume', '--max_iters=4', processes=2, status=None)
    assert done.status and 'the processes found different checkpoints' in done.err

def test_the_template_of_a_model_goes_on_to_what_is_finetuned_from_it(train):
    path = train('--max_iters=1').out_dir / 'ckpt.pt'
    held = load(path)
    path.unlink()
    torch.save({**held, 'template': 'ask: {instruction}'}, path)
    assert (load(train(f'--init_from={path}', '--max_iters=1', out_dir='b').out_dir / 'last.pt')['template']
            == 'ask: {instruction}')

def test_an_export_does_not_take_the_place_of_a_run_s_checkpoint(train, run):
    a, b = (train('--max_iters=1', out_dir=name).out_dir for name in 'ab')
    before = (b / 'last.pt').read_bytes()
    done = run('export.py', f'--out_dir={a}', '--weights_only=True', f"--to={b / 'last.pt'}",
               '--overwrite=True', status=2)
    assert 'is a file that no export wrote' in done.err and (b / 'last.pt').read_bytes() == before

def test_an_export_is_not_written_over_itself(train, run, tmp_path):
    small = tmp_path / 'small.pt'
    run('export.py', f"--out_dir={train('--max_iters=1').out_dir}", '--weights_only=True', f'--to={small}')
    before = small.read_bytes()
    again = run('export.py', f'--init_from={small}', '--weights_only=True', '--dtype=float16',
                f'--to={small}', '--overwrite=True', status=2)
    assert 'is what is exported' in again.err and small.read_bytes() == before

def test_an_exported_checkpoint_keeps_its_template(train, run, tmp_path):
    path = train('--max_iters=1').out_dir / 'ckpt.pt'
    held = load(path)
    path.unlink()
    torch.save({**held, 'template': 'ask: {instruction}'}, path)
    run('export.py', f'--init_from={path}', '--weights_only=True', f"--to={tmp_path / 'small.pt'}")
    assert load(tmp_path / 'small.pt')['template'] == 'ask: {instruction}'
