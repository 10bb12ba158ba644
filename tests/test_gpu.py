""" what only a CUDA device can show: the same losses as on a CPU, in every plan, in the memory predicted """
import json

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
CUDA = '--device=cuda', '--compile=False' # the compiler takes minutes

def losses(result):
    return [float(loss) for loss in result.column('loss') if loss]

def test_cuda_gives_the_cpu_losses(train):
    expected = losses(train(out_dir='cpu'))
    assert losses(train(*CUDA, out_dir='cuda')) == pytest.approx(expected, abs=1e-2) # TF32 products

@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_the_plans_give_the_same_losses_in(train, dtype):
    reference = losses(train(*CUDA, f'--dtype={dtype}', '--plan=device', out_dir='device'))
    for plan in ('recompute', 'offload'):
        assert losses(train(*CUDA, f'--dtype={dtype}', f'--plan={plan}', out_dir=plan)) == pytest.approx(
            reference, abs=1e-3)

def test_a_compiled_model_gives_the_eager_losses(train):
    expected = losses(train(*CUDA, '--dtype=bfloat16', out_dir='eager'))
    result = train('--device=cuda', '--dtype=bfloat16', '--compile=True', out_dir='compiled', timeout=280)
    assert ', compiled' in result.out
    assert losses(result) == pytest.approx(expected, abs=1e-2)

@pytest.mark.parametrize('plan', ['device', 'recompute', 'offload'])
def test_a_124M_model_takes_the_memory_predicted_in_plan(run, plan):
    out = run('bench.py', '--init_from=gpt2', f'--plan={plan}', '--batch_size=1', '--iters=2', '--json=True',
              '--gradient_accumulation_steps=2', *CUDA, timeout=280).out
    figures = json.loads(out.splitlines()[-1])
    # what is reserved is more than what tensors take, by the allocator's gaps
    assert 0.95 * figures['predicted_mb'] < figures['memory_mb'] < 1.1 * figures['predicted_mb']
