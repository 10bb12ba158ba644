"""
That an option does what it says: from the command line to the number it is for.
"""
import numpy as np
import pytest
import torch

def load(out_dir, name='last.pt'):
    return torch.load(out_dir / name, weights_only=True)

@pytest.fixture(scope='module')
def same(clone):
    """ a dataset in which all tokens are the same, so that losses differ only by weights and dropout """
    folder = clone / 'data' / 'same'
    folder.mkdir()
    for name in ('train.bin', 'val.bin'):
        np.zeros(2000, '<u2').tofile(folder / name)

STILL = ('--dataset=same', '--max_iters=3', '--eval_interval=99', '--weight_decay=0')

def losses(run):
    return [float(value) for value in run.column('loss') if value]

def test_each_iteration_drops_others(train, same):
    assert len(set(losses(train(*STILL, '--dropout=0.5', '--learning_rate=0', '--min_lr=0')))) == 3
    assert len(set(losses(train(*STILL, '--learning_rate=0', '--min_lr=0', out_dir='none')))) == 1

def test_grad_clip_bounds_the_update(train, same):
    """ AdamW's epsilon is far above so small a gradient """
    clipped, free = losses(train(*STILL, '--grad_clip=1e-12')), losses(train(*STILL, '--grad_clip=0', out_dir='free'))
    assert max(clipped) - min(clipped) < 1e-3 < max(free) - min(free)

def test_dropout_reaches_a_model_that_is_finetuned(train, tmp_path):
    train('--max_iters=1', out_dir='base')
    tuned = train(f"--init_from={tmp_path / 'base'}", '--dropout=0.2', '--max_iters=1', out_dir='tuned')
    assert load(tuned.out_dir)['model_args']['dropout'] == 0.2

def test_the_seed_is_that_of_the_weights_and_of_the_order(train, tmp_path):
    first, again, other = (train(f'--seed={seed}', '--max_iters=1', out_dir=name) for seed, name in ((1, 'a'), (1, 'b'), (2, 'c')))
    wpe = [load(run.out_dir, 'ckpt.pt')['model']['transformer.wpe.weight'] for run in (first, again, other)]
    assert torch.equal(wpe[0], wpe[1]) and not torch.allclose(wpe[0], wpe[2], atol=0.03)
    ordered = [losses(train(f"--init_from={tmp_path / 'a'}", f'--seed={seed}', '--max_iters=1', out_dir=f'order{seed}'))[0] for seed in (1, 2)]
    assert ordered[0] != ordered[1] # the same weights read other windows

def test_betas_and_weight_decay_reach_the_optimizer(train):
    run = train('--max_iters=1', '--beta1=0.8', '--beta2=0.9', '--weight_decay=0.3')
    groups = load(run.out_dir)['optimizer']['param_groups']
    assert [(tuple(group['betas']), group['weight_decay']) for group in groups] == [((0.8, 0.9), 0.3), ((0.8, 0.9), 0.0)]

def test_the_scaler_of_float16_goes_on_after_a_resume(train):
    whole = train('--dtype=float16', '--max_iters=4')
    train('--dtype=float16', '--max_iters=2', out_dir='half')
    resumed = train('--dtype=float16', '--max_iters=4', '--init_from=resume', out_dir='half')
    assert load(whole.out_dir)['scaler'] == load(resumed.out_dir)['scaler']

def test_top_k_top_p_and_temperature_reach_the_draw(train, run):
    train('--max_iters=1', '--learning_rate=0', '--min_lr=0') # nearly even, so that draws differ
    def drawn(*options):
        text = run('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=20', '--start=x', *options).out
        return text.partition('1 x 20 tokens')[0]
    greedy = drawn('--temperature=0')
    assert drawn('--top_k=1') == drawn('--top_k=0', '--top_p=1e-9') == greedy
    assert drawn('--top_k=0', '--temperature=1e-4') == greedy != drawn('--top_k=0', '--temperature=1')
