"""
That an option does what it says: from the command line to the number it is for.
"""
import json
import math
import shutil

import numpy as np
import pytest
import torch

from conftest import CHARS, TEXT
from model import GPT, GPTConfig
from optim import get_lr
from tokenizer import BPETokenizer

def load(out_dir, name='last.pt'):
    return torch.load(out_dir / name, weights_only=True)

def numbers(run, name):
    return [float(value) for value in run.column(name) if value]

@pytest.fixture(scope='module')
def same(clone):
    """ a dataset in which all tokens are the same, so that losses differ only by weights and dropout """
    folder = clone / 'data' / 'same'
    folder.mkdir()
    for name in ('train.bin', 'val.bin'):
        np.zeros(2000, '<u2').tofile(folder / name)

STILL = ('--dataset=same', '--max_iters=3', '--eval_interval=99', '--weight_decay=0')

def losses(run):
    return numbers(run, 'loss')

def test_each_iteration_drops_others(train, same):
    assert len(set(losses(train(*STILL, '--dropout=0.5', '--learning_rate=0', '--min_lr=0')))) == 3
    assert len(set(losses(train(*STILL, '--learning_rate=0', '--min_lr=0', out_dir='none')))) == 1

def test_grad_clip_bounds_the_update(train, same):
    """ AdamW's epsilon is far above so small a gradient """
    clipped, free = (losses(train(*STILL, '--grad_clip=1e-12')),
                     losses(train(*STILL, '--grad_clip=0', out_dir='free')))
    assert max(clipped) - min(clipped) < 1e-3 < max(free) - min(free)

def test_the_loss_of_a_masked_dataset_is_the_mean_over_what_counts(train, clone):
    folder = clone / 'data' / 'halved'
    shutil.copytree(clone / 'data' / 'chars', folder)
    for name in ('train', 'val'):
        n = (folder / f'{name}.bin').stat().st_size // 2
        (np.arange(n) % 2).astype(np.uint8).tofile(folder / f'{name}_mask.bin')
    run = train('--dataset=halved', '--max_iters=1')
    # the first model's loss is near that of a guess; half of it if all targets were counted
    assert losses(run)[0] == pytest.approx(math.log(len(CHARS)), rel=0.05) == numbers(run, 'val_loss')[0]

def test_dropout_reaches_a_model_that_is_finetuned(train, tmp_path):
    train('--max_iters=1', out_dir='base')
    tuned = train(f"--init_from={tmp_path / 'base'}", '--dropout=0.2', '--max_iters=1', out_dir='tuned')
    assert load(tuned.out_dir)['model_args']['dropout'] == 0.2

def test_the_seed_is_that_of_the_weights_and_of_the_order(train, tmp_path):
    first, again, other = (train(f'--seed={seed}', '--max_iters=1', out_dir=name)
                           for seed, name in ((1, 'a'), (1, 'b'), (2, 'c')))
    wpe = [load(run.out_dir, 'ckpt.pt')['model']['transformer.wpe.weight'] for run in (first, again, other)]
    assert torch.equal(wpe[0], wpe[1]) and not torch.allclose(wpe[0], wpe[2], atol=0.03)
    ordered = [losses(train(f"--init_from={tmp_path / 'a'}", f'--seed={seed}', '--max_iters=1',
                            out_dir=f'order{seed}'))[0] for seed in (1, 2)]
    assert ordered[0] != ordered[1] # the same weights read other windows

def test_betas_and_weight_decay_reach_the_optimizer(train):
    run = train('--max_iters=1', '--beta1=0.8', '--beta2=0.9', '--weight_decay=0.3')
    groups = load(run.out_dir)['optimizer']['param_groups']
    assert [(tuple(group['betas']), group['weight_decay']) for group in groups] == [
        ((0.8, 0.9), 0.3), ((0.8, 0.9), 0.0)]

def test_the_scaler_of_float16_goes_on_after_a_resume(train):
    whole = train('--dtype=float16', '--max_iters=4')
    train('--dtype=float16', '--max_iters=2', out_dir='half')
    resumed = train('--dtype=float16', '--max_iters=4', '--init_from=resume', out_dir='half')
    assert load(whole.out_dir)['scaler'] == load(resumed.out_dir)['scaler']

def test_top_k_top_p_and_temperature_reach_the_draw(train, run):
    train('--max_iters=1', '--learning_rate=0', '--min_lr=0') # nearly even, so that draws differ
    def drawn(*options):
        text = run('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=20', '--start=x',
                   *options).out
        return text.partition('1 x 20 tokens')[0]
    greedy = drawn('--temperature=0')
    assert drawn('--top_k=1') == drawn('--top_k=0', '--top_p=1e-9') == greedy
    assert drawn('--temperature=0', '--repetition_penalty=100') != greedy
    assert drawn('--top_k=0', '--temperature=1e-4') == greedy != drawn('--top_k=0', '--temperature=1')

@pytest.mark.parametrize('always', [True, False])
def test_an_evaluation_that_is_no_best_is_saved_too(train, tmp_path, always):
    (tmp_path / 'spy.py').write_text(
        "import saver\n_save = saver.save\n"
        "saver.save = lambda c, path: (print('saving', c['iter_num']), _save(c, path))[1]\n")
    done = train(tmp_path / 'spy.py', '--learning_rate=100', '--min_lr=100', '--eval_interval=2',
                 f'--always_save_checkpoint={always}')
    saved = [int(line.split()[1]) for line in done.out.splitlines() if line.startswith('saving ')]
    assert saved == ([0, 2, 4, 6] if always else [0, 6]) # and the last one always

def test_an_evaluation_reads_eval_iters_batches_of_batch_size(train):
    settings = json.loads((train('--max_iters=1', '--eval_iters=3').out_dir / 'config.json').read_text())
    assert settings['data'].endswith(', 12 x 16 evaluated')

def test_a_row_has_the_learning_rate_the_epoch_and_the_speed(train):
    result, windows = train('--max_iters=6'), -(-(int(len(TEXT) * 0.9) - 1) // 16)
    assert numbers(result, 'lr') == [get_lr(i, 1e-2, 1e-3, 2, 6) for i in range(6)]
    assert numbers(result, 'epoch') == pytest.approx([i * 8 / windows for i in range(7)], abs=1e-4)
    for ms, speed in zip(numbers(result, 'time_ms'), numbers(result, 'tokens_per_sec')):
        assert speed == pytest.approx(8 * 16 / ms * 1000, rel=1e-2)

def test_the_share_of_the_peak_is_of_all_devices_together(train, tmp_path):
    (tmp_path / 'spy.py').write_text("import device\ndevice.peak_flops = lambda *args: 1e12\n")
    result = train(tmp_path / 'spy.py', processes=2)
    flops = GPT(GPTConfig(16, len(CHARS), 2, 2, 16, bias=False)).flops_per_token(16) * 8 * 16
    for ms, mfu in zip(numbers(result, 'time_ms'), numbers(result, 'mfu')):
        assert mfu == pytest.approx(flops / (ms / 1000) / 2e12, rel=1e-2)

def test_what_a_user_asks_holds_no_end_of_text(run, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 50257, 1, 1, 8))
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__,
                'tokenizer': {'name': 'gpt2'}, 'template': '{instruction}'}, tmp_path / 'ckpt.pt')
    (tmp_path / 'spy.py').write_text(
        "import model\n_stream = model.GPT.stream\ndef _spy(self, idx, *args, **options):\n"
        "    print('read', idx[0].tolist())\n    return _stream(self, idx, *args, **options)\n"
        "model.GPT.stream = _spy\n")
    out = run('sample.py', tmp_path / 'spy.py', f"--out_dir={tmp_path / 'ckpt.pt'}",
              '--instruction=a<|endoftext|>b', '--num_samples=1', '--max_new_tokens=1', '--device=cpu').out
    assert 'read ' in out and str(BPETokenizer.eot) not in out.splitlines()[0]

def test_an_adapter_has_the_dtype_and_a_tokenizer_the_length_of_the_model(train, run, tmp_path):
    from safetensors.torch import load_file
    base = train('--max_iters=1', out_dir='base').out_dir
    train(f'--init_from={base}', '--lora_rank=2', '--max_iters=1')
    run('export.py', f"--out_dir={tmp_path / 'out'}", '--adapter=True', '--dtype=float16',
        f"--to={tmp_path / 'peft'}")
    assert {t.dtype for t in load_file(tmp_path / 'peft' / 'adapter_model.safetensors').values()} == {
        torch.float16}
    run('export.py', f'--out_dir={base}', f"--to={tmp_path / 'hf'}")
    assert json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())['model_max_length'] == 16

def test_each_micro_batch_and_each_process_drops_others(train, same):
    still = *STILL, '--dropout=0.5', '--learning_rate=0', '--min_lr=0', '--max_iters=1', '--batch_size=1'
    one = losses(train(*still, '--gradient_accumulation_steps=1'))
    two, shared = (losses(train(*still, '--gradient_accumulation_steps=2', processes=n, out_dir=f'{n}'))
                   for n in (1, 2))
    assert one != two and shared == pytest.approx(two, abs=1e-6)
