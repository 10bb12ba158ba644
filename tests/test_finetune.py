"""
Finetuning as a user runs it: an end before it overfits, parts that stay frozen, LoRA, mixtures, masks,
samples.
"""
import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch

from checkpoint import load_model
from conftest import TINY

def load(path):
    return torch.load(path, weights_only=True)

@pytest.fixture(scope='module')
def base(clone, forks, tmp_path_factory):
    """ a tiny run to finetune from """
    out_dir = tmp_path_factory.mktemp('base') / 'out'
    status, _, err = forks('train.py', ['--dataset=chars', *TINY, '--max_iters=20', f'--out_dir={out_dir}'],
                           clone, 120, 1)
    assert status == 0, err
    return out_dir

@pytest.fixture(scope='module')
def masked(clone):
    """ the character dataset, of which only every third token is to be predicted, with a template """
    folder = clone / 'data' / 'masked'
    shutil.copytree(clone / 'data' / 'chars', folder)
    for split in ('train', 'val'):
        n = (folder / f'{split}.bin').stat().st_size // 2
        (np.arange(n) % 3 == 0).astype(np.uint8).tofile(folder / f'{split}_mask.bin')
    (folder / 'template.txt').write_text('ask: {instruction}\nA:')
    return folder

def test_patience_ends_the_run_with_the_best_in_place_and_resuming_stays_ended(train, base):
    options = (f'--init_from={base}', '--learning_rate=10.0', '--patience=2', '--max_iters=40')
    result = train(*options)
    losses = [(float(v), int(i)) for v, i in zip(result.column('val_loss'), result.column('iter')) if v]
    best = min(losses)[1]
    assert losses[-1][1] == best + 2 * 4 < 40 # two evaluations after the best, which come every 4 iterations
    assert load(result.out_dir / 'ckpt.pt')['iter_num'] == best
    assert f'2 evaluations in a row were no better than that of iteration {best}' in result.out
    before = result.column('val_loss')
    again = train('--init_from=resume', *options[1:])
    assert 'so it ended' in again.out and again.column('val_loss') == before
    more = train('--init_from=resume', '--patience=4', *options[1:2], '--max_iters=40')
    assert int(more.column('iter')[-1]) > losses[-1][1]

def test_patience_counts_on_over_a_resume(train, base):
    options = ('--learning_rate=10.0', '--max_iters=40', '--eval_interval=2')
    whole = train(f'--init_from={base}', '--patience=4', *options)
    train(f'--init_from={base}', '--patience=2', *options, out_dir='half')
    half = train('--init_from=resume', '--patience=4', *options, out_dir='half')
    assert half.column('iter') == whole.column('iter') and half.column('val_loss') == whole.column('val_loss')

def test_patience_begins_anew_with_another_dataset(train, base, clone):
    shutil.copytree(clone / 'data' / 'chars', clone / 'data' / 'others')
    options = ('--patience=2', '--eval_interval=1', '--decay_lr=False', f'--init_from={base}')
    train(*options, '--learning_rate=0.5', '--max_iters=2')
    done = train(*options[:3], '--init_from=resume', '--dataset=others', '--learning_rate=0.5',
                 '--max_iters=50')
    assert "the best so far was judged by chars: to count anew, type --init_from=" in done.out
    # of iteration 2 again, and two more
    assert len([line for line in done.out.splitlines() if line.startswith('step ')]) == 3
    again = train(*options[:3], '--init_from=resume', f"--dataset={clone / 'data' / 'others'}",
                  '--learning_rate=0.5', '--max_iters=50')
    assert 'judged by' not in again.out # it is the same folder
    with open(clone / 'data' / 'others' / 'val.bin', 'ab') as file:
        file.write(bytes(2)) # prepared again, of another text
    changed = train(*options[:3], '--init_from=resume', '--learning_rate=0.5', '--max_iters=50',
                    f"--dataset={clone / 'data' / 'others'}")
    assert ('the best so far was judged by other windows of ' in changed.out
            and ': to count anew, type --init_from=' in changed.out)
    assert len([line for line in changed.out.splitlines() if line.startswith('step ')]) > 1
    assert len([line for line in again.out.splitlines() if line.startswith('step ')]) == 1

def test_patience_begins_anew_with_other_weights_of_a_mixture(train, clone):
    shutil.copytree(clone / 'data' / 'chars', clone / 'data' / 'more')
    train('--dataset=chars:0.9,more:0.1', '--max_iters=2')
    for weights, counts_on in (('9,more:1', True), ('1,more:9', False)):
        done = train('--init_from=resume', f'--dataset=chars:{weights}', '--max_iters=3')
        assert ('judged by' not in done.out) == counts_on

def test_a_shape_that_a_resumed_run_did_not_take_is_not_asked_for_again(train):
    train('--max_iters=1')
    assert 'n_layer stays' in train('--init_from=resume', '--n_layer=3', '--max_iters=2').out
    assert 'n_layer' not in train('--init_from=resume', '--max_iters=3').out

def test_a_finetune_that_never_beats_its_base_leaves_it_and_says_so(train, base):
    result = train(f'--init_from={base}', '--learning_rate=100.0')
    assert 'no evaluation was better than that of the model it started from' in result.out
    kept, was = load(result.out_dir / 'ckpt.pt'), load(base / 'ckpt.pt')
    assert kept['iter_num'] == 0 and all(torch.equal(kept['model'][k], was['model'][k]) for k in was['model'])

def test_frozen_parts_are_those_of_the_base(train, base):
    result = train(f'--init_from={base}', '--freeze=wte,h.0')
    kept, was = load(result.out_dir / 'last.pt')['model'], load(base / 'ckpt.pt')['model']
    same = {k.split('.')[1] + k.split('.')[2] for k in was
            if torch.equal(kept[k], was[k]) and k != 'lm_head.weight'}
    assert same == {'wteweight', 'h0'} and 'of them to train' in result.out

def test_lora_keeps_the_adapter_alone_and_resumes_and_samples_and_merges(train, run, base):
    options = ('--lora_rank=4', '--lora_dropout=0.1', '--learning_rate=3e-3', '--eval_iters=0')
    whole = train(f'--init_from={base}', *options, '--max_iters=8')
    train(f'--init_from={base}', *options, '--max_iters=4', '--lr_decay_iters=8', out_dir='half')
    half = train('--init_from=resume', *options, '--max_iters=8', '--lr_decay_iters=8', out_dir='half')
    assert half.column('loss') == whole.column('loss') and half.column('val_loss') == whole.column('val_loss')
    kept = load(whole.out_dir / 'last.pt')
    # 0 at first
    assert all(t.abs().max() > 1e-3 for name, t in kept['model'].items() if name.endswith('lora_B'))
    assert kept['base'] == str(base / 'ckpt.pt') and all('.lora_' in name for name in kept['model'])
    model, _ = load_model(str(whole.out_dir / 'last.pt'))
    was = load(base / 'ckpt.pt')['model']
    name = 'transformer.h.1.mlp.c_proj'
    product = 32 / 4 * kept['model'][name + '.lora_B'] @ kept['model'][name + '.lora_A']
    assert torch.allclose(model.state_dict()[name + '.weight'], was[name + '.weight'] + product, atol=1e-6)
    assert run('sample.py', '--num_samples=1', '--max_new_tokens=5', '--device=cpu').out
    whole_again = train('--init_from=resume', '--max_iters=9', '--lora_rank=0', status=2)
    assert "the checkpoint's adapter has 4; type --lora_rank=4" in whole_again.err

def test_an_adapter_whose_base_is_gone_or_another_is_refused(train, run, base, tmp_path):
    mine = tmp_path / 'mine'
    shutil.copytree(base, mine)
    train(f'--init_from={mine}', '--lora_rank=2', '--max_iters=1')
    shutil.copy(base / 'last.pt', mine / 'ckpt.pt')
    state = load(mine / 'ckpt.pt')
    state['model']['transformer.ln_f.weight'][0] += 1
    torch.save(state, mine / 'ckpt.pt')
    done = run('sample.py', status=2)
    assert 'is no longer the model that the adapter in' in done.err and 'Traceback' not in done.err
    shutil.rmtree(mine)
    assert 'holds an adapter for' in run('sample.py', status=2).err

def test_an_adapter_does_not_overwrite_its_base_and_both_may_move(train, run, base, tmp_path):
    mine = tmp_path / 'old' / 'mine'
    shutil.copytree(base, mine)
    for source in (mine, mine / 'ckpt.pt'):
        done = train(f'--init_from={source}', '--lora_rank=2', '--overwrite=True', f'--out_dir={mine}',
                     status=2)
        assert f'init_from, {source}, or what it is' in done.err
    assert load(mine / 'ckpt.pt')['iter_num'] == load(base / 'ckpt.pt')['iter_num']
    train(f'--init_from={mine}', '--lora_rank=2', '--max_iters=1',
          f"--out_dir={tmp_path / 'old' / 'adapter'}")
    shutil.move(tmp_path / 'old', tmp_path / 'new')
    assert run('sample.py', '--num_samples=1', '--max_new_tokens=5',
               f"--out_dir={tmp_path / 'new' / 'adapter'}").out

def test_an_adapter_for_a_folder_of_hugging_face_s_moves_with_it(run, base, tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    run('export.py', f'--out_dir={base}', f"--to={old / 'hf'}")
    run('train.py', '--dataset=chars', *TINY, f"--init_from={old / 'hf'}", '--lora_rank=2', '--max_iters=1',
        f"--out_dir={old / 'lora'}")
    shutil.move(old, new)
    assert run('sample.py', '--num_samples=1', '--max_new_tokens=5', f"--out_dir={new / 'lora'}").out

def test_a_run_spares_the_folder_it_starts_from_and_what_other_programs_wrote(train, run, base, tmp_path):
    hf = tmp_path / 'hf'
    run('export.py', f'--out_dir={base}', f'--to={hf}')
    before = {path.name: path.read_bytes() for path in hf.iterdir()}
    for source in (f'--init_from={hf}', f'--init_from={base}', '--init_from=scratch'):
        for more in ((), ('--overwrite=True',)):
            assert 'type --' in train(source, *more, f'--out_dir={hf}', status=2).err
    assert {path.name: path.read_bytes() for path in hf.iterdir()} == before
    assert 'init_from, gpt2, or what it is' in train('--init_from=gpt2', '--out_dir=gpt2', status=2).err

def test_an_adapter_does_not_take_the_place_of_a_resumed_run_s_weights(train, run, base, tmp_path):
    run('export.py', f'--out_dir={base}', f"--to={tmp_path / 'out' / 'ckpt.pt'}", '--weights_only=True')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    assert 'has no adapter' in train('--init_from=resume', '--lora_rank=2', '--max_iters=20', status=2).err
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before

def test_a_text_of_the_user_s_in_samples_txt_stays(train, tmp_path):
    (tmp_path / 'out').mkdir()
    mine = 'é: my own\n'.encode('latin-1') # no UTF-8
    (tmp_path / 'out' / 'samples.txt').write_bytes(mine)
    options = '--sample_interval=3', '--sample_tokens=5'
    whole = train(*options).out_dir / 'samples.txt'
    text = whole.read_bytes()
    assert (text.startswith(mine) and text.count(b'- iteration ') == 3
            and (tmp_path / 'out' / 'report.md').exists())
    train(*options, '--overwrite=True')
    assert whole.read_bytes() == text # an earlier run's samples go
    train(*options, '--init_from=resume', '--max_iters=7')
    assert whole.read_bytes() == text
    train(*options, '--init_from=resume', '--max_iters=8', '--sample_interval=100')
    assert whole.read_bytes() == text # whose last is of the iteration that is resumed at, or before it
    whole.write_bytes(text[len(mine):])
    train('--overwrite=True')
    assert (not whole.exists()
            and 'What it wrote' not in (tmp_path / 'out' / 'report.md').read_text(encoding='utf-8'))

def test_another_freeze_or_another_adapter_is_not_resumed(train, base):
    train(f'--init_from={base}', '--freeze=h.0', '--max_iters=1')
    done = train('--init_from=resume', '--freeze=h.1', status=2)
    assert "the run froze h.0, and freeze is 'h.1'" in done.err
    train(f'--init_from={base}', '--lora_rank=2', '--max_iters=1', out_dir='b')
    done = train('--init_from=resume', '--lora_rank=2', '--lora_alpha=64', status=2, out_dir='b')
    assert "type --lora_alpha=32.0" in done.err
    assert 'muon does not train LoRA' in train(
        f'--init_from={base}', '--lora_rank=2', '--optimizer=muon', status=2, out_dir='c').err

def test_lora_needs_a_model_to_start_from_and_matrices_it_knows(train, base):
    assert 'lora_rank needs a model to start from' in train('--lora_rank=4', status=2).err
    assert 'type --lora_targets' in train(f'--init_from={base}', '--lora_rank=4', '--lora_targets=attn',
                                          status=2).err

def test_a_mixture_trains_and_one_of_other_tokens_is_refused(train, run, clone):
    shutil.copytree(clone / 'data' / 'chars', clone / 'data' / 'other')
    result = train('--dataset=chars:0.7,other:0.3')
    assert (f"{2 * (clone / 'data' / 'chars' / 'train.bin').stat().st_size // 2:,} tokens to train on"
            in result.out)
    assert 'epochs of data/other' in result.out and (result.out_dir / 'loss.png').exists()
    resumed = train('--dataset=chars:0.7,other:0.3', '--init_from=resume', '--max_iters=8')
    assert all(float(loss) < 5 for loss in resumed.column('val_loss') if loss)
    (clone / 'data' / 'other' / 'meta.pkl').unlink()
    assert 'are in different tokens' in train('--dataset=chars,other', status=2, out_dir='b').err

def test_a_mixture_of_two_templates_is_refused(train, clone):
    for name, template in (('asked', 'Q: {instruction}'), ('told', 'Do: {instruction}')):
        shutil.copytree(clone / 'data' / 'chars', clone / 'data' / name)
        (clone / 'data' / name / 'template.txt').write_text(template)
    refused = train('--dataset=chars,asked,told', status=2)
    assert 'plan device' not in refused.out # before any work is done
    error = refused.err.splitlines()[-1]
    assert (error.startswith(f"error: {os.path.join('data', 'asked', 'template.txt')} and ")
            and '--template=FILE:PATH' in error)
    train('--dataset=chars,asked', '--max_iters=1')

def test_masked_losses_are_the_same_for_any_split_and_the_template_travels(train, masked):
    options = ('--dataset=masked', '--eval_iters=0')
    one = train(*options, '--batch_size=8', '--gradient_accumulation_steps=1')
    many = train(*options, '--batch_size=1', '--gradient_accumulation_steps=8', out_dir='many')
    two = train(*options, processes=2, out_dir='two')
    for other in (many, two):
        for name in ('loss', 'val_loss'):
            a, b = ([float(v) for v in result.column(name) if v] for result in (one, other))
            assert a == pytest.approx(b, abs=1e-5)
    assert load(one.out_dir / 'ckpt.pt')['template'] == 'ask: {instruction}\nA:'

def test_only_the_unmasked_tokens_count_in_the_loss(train, base, masked):
    result = train(f'--init_from={base}', '--dataset=masked', '--eval_iters=0', '--max_iters=1')
    model, _ = load_model(str(base))
    tokens = torch.from_numpy(np.fromfile(masked / 'val.bin', dtype='<u2').astype(np.int64))
    total, n = 0.0, 0
    for start in range(0, len(tokens) - 1, 16): # the windows of an evaluation, one by one
        x, y = tokens[start:start + 16][:len(tokens) - 1 - start], tokens[start + 1:start + 17]
        logits = model.lm_head(model.hidden(x[None]))[0]
        counts = torch.arange(start + 1, start + 1 + len(y)) % 3 == 0
        losses = torch.nn.functional.cross_entropy(logits, y, reduction='none')
        total, n = total + losses[counts].sum().item(), n + int(counts.sum())
    assert float(result.column('val_loss')[0]) == pytest.approx(total / n, abs=1e-5)

def test_samples_are_written_while_it_trains_and_leave_the_losses_alone(train):
    plain = train('--dropout=0.1')
    result = train('--dropout=0.1', '--sample_interval=3', '--sample_tokens=20', '--sample_start=def ',
                   out_dir='b')
    text = (result.out_dir / 'samples.txt').read_text()
    assert [f'iteration {i}\ndef ' in text for i in (0, 3, 6, 1)] == [True, True, True, False]
    assert result.column('loss') == plain.column('loss')
    assert 'not in this model' in train('--sample_interval=3', '--sample_start=é', status=2, out_dir='c').err

def test_a_finetuned_model_s_own_shape_is_in_its_config_and_report(train, base):
    result = train('--n_embd=32', '--n_layer=7', '--n_head=4', f'--init_from={base}')
    settings, shape = (json.loads((result.out_dir / 'config.json').read_text()),
                       load(base / 'ckpt.pt')['model_args'])
    for key in ('n_layer', 'n_head', 'n_embd', 'bias'):
        assert (settings[key] == shape[key]
                and f'    {key} = {shape[key]!r}\n' in (result.out_dir / 'report.md').read_text())
    assert settings['given']['n_layer'] == 7
    table = train('--n_embd=32', '--n_layer=7', '--n_head=4', f'--init_from={base}', '--dry_run=True').out
    # an epoch's time is known
    assert ' s  yes ' in next(line for line in table.splitlines() if line.startswith('device'))

def test_a_report_tells_the_run(train):
    result = train('--sample_interval=6', '--sample_tokens=20')
    text = (result.out_dir / 'report.md').read_text()
    rows = list(csv.DictReader(open(result.out_dir / 'log.csv', newline='')))
    for row in rows:
        if row['val_loss']:
            assert f"| {row['iter']} | {float(row['epoch']):.2f} | {float(row['train_loss']):.4f} | " in text
    assert 'n_layer = 2' in text and 'torch ' in text and 'iteration 6' in text.split('What it wrote last')[1]

def test_a_run_that_wandb_does_not_let_start_leaves_the_one_before(train, clone):
    files = {path: path.read_bytes() for path in train('--max_iters=1').out_dir.iterdir()}
    env = {'WANDB_API_KEY': '', 'WANDB_MODE': 'online', 'HOME': str(clone),
           'WANDB_BASE_URL': 'http://127.0.0.1:9', 'NETRC': str(clone / 'none')}
    done = train('--overwrite=True', '--wandb_log=True', env=env, status=2)
    assert 'wandb does not start' in done.err
    assert {path: path.read_bytes() for path in files} == files

def test_wandb_s_run_is_the_same_after_a_resume(train, tmp_path):
    env = {'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path), 'WANDB_SILENT': 'true'}
    first = train('--wandb_log=True', '--max_iters=2', env=env)
    run_id = json.load(open(first.out_dir / 'config.json'))['wandb_id']
    train('--wandb_log=True', '--init_from=resume', '--max_iters=4', env=env)
    assert json.load(open(first.out_dir / 'config.json'))['wandb_id'] == run_id
    runs = [folder.name for folder in (tmp_path / 'wandb').glob('offline-run-*')]
    assert runs and all(name.endswith(run_id) for name in runs)

def test_a_question_is_put_by_the_template_and_only_answers_are_printed(train, run, masked):
    told = train('--dataset=masked', '--max_iters=1').out.splitlines()[-1]
    assert told.startswith('next: python sample.py --out_dir=') and told.endswith(' --instruction=TEXT')
    greedy = ('--temperature=0', '--num_samples=1', '--max_new_tokens=12', '--device=cpu')
    asked = run('sample.py', '--instruction=say {input}', *greedy)
    started = run('sample.py', '--start=ask: say {input}\nA:', *greedy)
    assert 'ask: say {input}\nA:' + asked.out == started.out

def test_a_model_that_saw_no_instructions_is_not_asked(run, base):
    assert 'was not trained on instructions' in run('sample.py', f'--out_dir={base}', '--instruction=x',
                                                    status=2).err

def test_an_iteration_whose_windows_a_mask_leaves_empty_is_no_error(train, clone):
    folder = clone / 'data' / 'sparse'
    shutil.copytree(clone / 'data' / 'chars', folder)
    for name in ('train', 'val'):
        n = (folder / f'{name}.bin').stat().st_size // 2
        (np.arange(n) < 40).astype(np.uint8).tofile(folder / f'{name}_mask.bin')
    run = train('--dataset=sparse', '--max_iters=4', '--eval_interval=9', '--eval_iters=0')
    assert 0.0 in [float(v) for v in run.column('loss') if v]
