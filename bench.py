"""
Measures what train.py's options cost on this machine: tokens/s, ms per iteration, MFU and peak memory.

Takes train.py's configs and options (init_from: only scratch and GPT-2's names) and the options below. The
weights are random, so nothing is downloaded:
$ python bench.py config/finetune/gpt2_medium.py --batch_size=4 --gradient_accumulation_steps=1
To print the tables of docs/performance.md (with --suite=gpu also those of docs/memory.md):
$ python bench.py --suite=cpu
"""
# -----------------------------------------------------------------------------
# options, besides train.py's

iters = 10 # iterations to measure; the median is reported
skip = 3 # warm-up iterations before those; 1 for work = 'sample'
data = 'synthetic' # synthetic (random tokens) or real (the dataset's)
work = 'train' # train; sample (num_samples x 128 tokens); batch (only fetching); cards (memory by card size)
way = 'fitgpt' # fitgpt; nanogpt (all logits at once, plain layers, AdamW); transformers (for work = 'sample')
num_samples = 1 # texts generated at once, for work = 'sample'
profile = False # write trace.json, for chrome://tracing or ui.perfetto.dev
json = False # print one JSON object
suite = '' # cpu or gpu: run many measurements, each in its own process, and print tables

import os

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), encoding='utf-8') as file:
    exec(file.read().partition('from configurator')[0]) # train.py's options and their defaults
gradient_accumulation_steps = 1 # instead of train.py's 40, which would take hours on a CPU

from configurator import configure
config = configure(globals(), at_least_1=('iters', 'batch_size', 'gradient_accumulation_steps', 'block_size',
                                          'num_samples'), choices={
    'data': ('synthetic', 'real'), 'work': ('train', 'sample', 'batch', 'cards'),
    'way': ('fitgpt', 'nanogpt', 'transformers'), 'suite': ('', 'cpu', 'gpu')})

if dry_run or eval_only:
    raise ValueError("dry_run and eval_only are train.py's; type python train.py with them")
if way not in ('fitgpt', {'train': 'nanogpt', 'cards': 'nanogpt', 'sample': 'transformers'}.get(work)):
    raise ValueError(f"there is no way {way!r} for work {work!r}; type --way=fitgpt")

# -----------------------------------------------------------------------------
# set-up

import json as json_module
import math
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import lora
import memory
from dataset import Split, find_datasets, open_split, read_shared_state, tell_assumed
from device import (DTYPES, allow_cudnn_attention, autocast, compile_model, fetch, free_memory,
                    is_out_of_memory, memory_mb, memory_to_fill, peak_flops, pick_compile, pick_device,
                    pick_dtype, train_fast)
from model import GPT, GPT2_SHAPES, Block, GPTConfig, check_length
from optim import check_options, clip_gradients, make_optimizer
from recompute import Linear
from tokenizer import count_ids

check_options(config | {'decay_lr': False}) # no schedule here
device = pick_device(device)
dtype = pick_dtype(dtype, device)
compile = pick_compile(compile, device)
if profile:
    open('trace.json', 'a').close() # fail now if it cannot be written
if work != 'sample':
    train_fast(device, dropout)
elif way == 'transformers':
    allow_cudnn_attention(True) # as torch does unless told otherwise

def cards():
    """ the card sizes in GiB that this GPU can emulate """
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return [gb for gb in (4, 8, 12, 16, 24) if gb < total + 1]

def wait():
    """ block until the device has finished its queued work """
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()

def seconds(job, n, before):
    """ the median seconds per call of `job` over n calls, after `before` warm-up calls """
    times = []
    for i in tqdm(range(before + n), unit='iteration', leave=False, delay=2):
        if profile and i == before:
            trace = torch.profiler.profile()
            trace.start()
        wait()
        begin = time.perf_counter()
        job(i)
        wait()
        times.append(time.perf_counter() - begin)
    if profile:
        trace.stop()
        trace.export_chrome_trace('trace.json')
        print('wrote trace.json', file=sys.stderr)
    return statistics.median(times[before:])

def model_config():
    """ the shape of the model that train.py would train; random weights are as fast as trained ones """
    if init_from in GPT2_SHAPES:
        return GPTConfig(**GPT2_SHAPES[init_from], dropout=dropout)
    folders = find_datasets(dataset)
    print(tell_assumed(folders), end='', file=sys.stderr)
    vocab_size = count_ids(read_shared_state(folders))
    if init_from != 'scratch':
        raise ValueError(f"init_from is {init_from!r}; type --init_from=NAME with one of scratch, "
                         f"{', '.join(GPT2_SHAPES)}: only the shape matters here")
    return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)

# -----------------------------------------------------------------------------
# training

class PlainBlock(Block):
    """ a block that keeps what autograd keeps, compiled or not, like nanoGPT's """
    forward = Block.layers

class AllLogits(torch.nn.Module):
    """ a GPT with nanoGPT's loss, computed from the logits of all tokens at once """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets, scale):
        logits = F.linear(self.model.hidden(idx), self.model.lm_head.weight)
        return None, scale * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum')

def make_training():
    """ a function that runs one iteration as train.py does, and a dict of facts about it """
    sequences, c = batch_size * gradient_accumulation_steps, model_config()
    if shard:
        raise ValueError("shard is True, but one process is measured here; type --shard=False")
    check_length(block_size, c.block_size)
    with torch.device('meta'):
        shape = GPT(c)
        lora.restrict(shape, config)
    shape = memory.shape_of(shape, block_size, dropout, dtype != 'float32', lora_rank > 0,
                            optimizer == 'muon', device=device)
    budget = memory_to_fill(device, memory_gb)
    plain, plans = way == 'nanogpt', memory.plans_for(config, device)
    chosen, fits = ('device', batch_size) if plain else memory.choose(
        plan, shape, sequences, batch_size, budget, plans, free_memory('cpu'))
    micro_batch, n_steps = memory.split_batch(sequences, fits)
    torch.manual_seed(seed)
    with torch.device('cpu' if chosen == 'offload' or lora_rank else device): # LoRA moves after shrinking
        model = GPT(c)
        lora.restrict(model, config)
    if lora_rank:
        lora.shrink(model, DTYPES[dtype])
        model.to(device)
    model.follow(chosen)
    if plain:
        net, learn = AllLogits(model), [p for p in model.parameters() if p.requires_grad]
        fused = device.startswith('cuda') # nanoGPT uses it only there
        opt = torch.optim.AdamW(learn, lr=learning_rate, betas=(beta1, beta2), fused=fused)
        clip = partial(torch.nn.utils.clip_grad_norm_, learn)
        for module in model.modules():
            if isinstance(module, Linear): # nanoGPT's linear keeps a copy of its weight for backward
                module.__class__ = torch.nn.Linear
            elif isinstance(module, Block):
                module.__class__ = PlainBlock
    else:
        net, offload_to = model, (device, DTYPES[dtype]) if chosen == 'offload' else None
        opt = make_optimizer(optimizer, model, learning_rate, muon_learning_rate, weight_decay,
                             (beta1, beta2), offload_to, dtype != 'bfloat16')
        clip = partial(clip_gradients, opt)
    if data == 'real':
        split = open_split(find_datasets(dataset), 'train', block_size, c.vocab_size, seed=seed)
    else:
        tokens = torch.randint(c.vocab_size, (sequences, block_size + 1), device=device)
    n_tokens = sequences * block_size

    def batches(i):
        if data == 'synthetic':
            return [(b[:, :-1], b[:, 1:]) for b in tokens.split(micro_batch)]
        windows = split.training_windows(i, sequences)
        return [fetch(*split.batch(w), device) for w in windows.reshape(n_steps, micro_batch, 2)]

    def iteration(i):
        for x, y in batches(i):
            with autocast(device, dtype, cache=plain):
                _, loss = net(x, y, scale=1 / n_tokens)
            loss.backward()
            if chosen == 'offload':
                opt.collect()
        clip(grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)

    predicted = None if plain else memory.peak(chosen, shape, micro_batch, n_steps > 1) / 2**20
    compiled = compile and compile_model([net] if plain else model.compiled_parts(), lambda: iteration(0))
    if device.startswith('cuda'): # what the compiler took is not the iterations'
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return iteration, {'plan': chosen, 'micro_batch': micro_batch, 'dtype': dtype, 'compiled': compiled,
                       'tokens': n_tokens, 'flops': model.flops_per_token(block_size) * n_tokens,
                       'predicted_mb': predicted}

def measure_training():
    iteration, known = make_training()
    took = seconds(iteration, iters, skip)
    tokens, flops, peak = known.pop('tokens'), known.pop('flops'), peak_flops(device, dtype)
    return {'tokens_per_sec': tokens / took, 'ms': took * 1000, **known, 'memory_mb': memory_mb(device),
            'mfu': flops / took / peak if peak else None}

def measure_cards():
    """ the peak memory an iteration reserves on each of cards(), from the largest down, while it fits """
    if not device.startswith('cuda'):
        raise ValueError(f"device is {device!r}, but only what a CUDA device reserves can be limited; type "
                         "--device=cuda")
    iteration, known = make_training()
    iteration(0) # creates the optimizer's moments
    held = {}
    for gb in reversed(cards()):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        memory_to_fill(device, gb)
        try:
            iteration(1)
            iteration(2)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        held[gb] = memory_mb(device)
    return {'predicted_mb': known['predicted_mb'], 'held_mb': held}

# -----------------------------------------------------------------------------
# sampling and data

@torch.no_grad()
def measure_sampling():
    """ generate num_samples texts of 128 tokens, after a prompt of 128 """
    torch.manual_seed(seed)
    c = model_config()
    prompt = torch.randint(c.vocab_size, (num_samples, 128), device=device)
    if way == 'transformers':
        from transformers import GPT2Config, GPT2LMHeadModel
        theirs = GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        model = GPT2LMHeadModel(theirs).eval().to(device, DTYPES[dtype])
        options = dict(do_sample=True, top_k=200, min_new_tokens=128, max_new_tokens=128, pad_token_id=50256)
        job = lambda i: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    else:
        model = GPT(c).eval().to(device, DTYPES[dtype])
        job = lambda i: model.generate(prompt, 128, top_k=200)
    took = seconds(job, iters, 1)
    return {'tokens_per_sec': num_samples * 128 / took, 'ms': took * 1000, 'dtype': dtype,
            'memory_mb': memory_mb(device)}

def measure_batches():
    """ fetch batch_size windows from a file of random tokens, as train.py does """
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(seed).integers(50257, size=2**24).astype('<u2').tofile(f'{folder}/train.bin')
        split = Split(folder, 'train', block_size, 50257, seed)
        windows = [split.training_windows(i, batch_size) for i in range(skip + iters)]
        took = seconds(lambda i: split.batch(windows[i]), iters, skip)
        del split
    return {'tokens_per_sec': batch_size * block_size / took, 'ms': took * 1000}

# -----------------------------------------------------------------------------
# suites

def spawn(*options):
    """ the figures of one run of this script in its own process, or why there are none, as text """
    done = subprocess.run([sys.executable, __file__, '--json=True', *options], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding='utf-8')
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f'ended with status {done.returncode}'])[-1]
        print(f"{' '.join(options)}: {why}", file=sys.stderr)
        return 'does not fit' if 'out of memory' in done.stderr else 'failed'
    return json_module.loads(done.stdout.splitlines()[-1])

def compare(title, ours, theirs):
    """ print a row: alternate two kinds of run three times; medians of each and of their ratios """
    pairs = [(spawn(*ours), spawn(*theirs)) for _ in range(3)]
    failed = [figures for pair in pairs for figures in pair if isinstance(figures, str)]
    if failed:
        return print(f"| {title} | {failed[0]} | | | | |")
    speed = [statistics.median(p[k]['tokens_per_sec'] for p in pairs) for k in (0, 1)]
    ratio = statistics.median(a['tokens_per_sec'] / b['tokens_per_sec'] for a, b in pairs)
    held = [statistics.median(p[k]['memory_mb'] for p in pairs) for k in (0, 1)]
    note = ', compiled' if pairs[0][0].get('compiled') else ''
    note += f", MFU {pairs[0][0]['mfu']:.1%}" if pairs[0][0].get('mfu') else ''
    print(f"| {title} | {speed[0]:,.1f}{note} | {speed[1]:,.1f} | {ratio:.2f} | {held[0]:,.0f} | "
          f"{held[1]:,.0f} |", flush=True)

HEAD = "| work | tok/s | of the other | ratio | MiB | of the other |\n|---|---|---|---|---|---|"

def run_suite():
    gpu = suite == 'gpu'
    if gpu and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; type --suite=cpu")
    place = f'--device={"cuda" if gpu else "cpu"}'
    print(f"{time.strftime('%Y-%m-%d')}, "
          f"{torch.cuda.get_device_name() if gpu else f'{os.cpu_count()} CPUs'}, "
          f"torch {torch.__version__}\n\n{HEAD}", flush=True)
    train = [place, '--init_from=gpt2', '--gradient_accumulation_steps=1',
             *(['--batch_size=12', '--iters=20'] if gpu
               else ['--batch_size=2', '--block_size=512', '--iters=4'])]
    compare('training 124M, beside nanoGPT\'s way', train,
            [*train, '--way=nanogpt', '--dtype=bfloat16' if gpu else '--dtype=float32'])
    sampling = [place, '--work=sample', '--init_from=gpt2', '--iters=3']
    best = pick_dtype('auto', 'cuda' if gpu else 'cpu')
    rows = [(1, 'float32'), (1, best), (10, best)] # float32 may be transformers' faster one for one text
    for n, other in rows[1:] if gpu or best == 'float32' else rows:
        each = [*sampling, f'--num_samples={n}']
        compare(f'sampling 124M, {n} at once, beside transformers in {other}', each,
                [*each, '--way=transformers', f'--dtype={other}'])
    fetched = spawn('--work=batch', '--batch_size=12', '--block_size=1024', '--iters=300')
    took = fetched if isinstance(fetched, str) else f"{fetched['ms']:,.3f} ms"
    print(f"\nfetching 12 x 1024 tokens: {took}")
    if gpu:
        card_table(place)

def card_table(place):
    """ print the peak of each size and plan, on cards emulated by limiting what a process may reserve """
    sizes = [str(gb) for gb in cards()]
    print("\nGiB reserved, not compiled, micro-batch 1, two of them an iteration\n")
    print('| plan | size | predicted | ' + ' | '.join(f'{gb} GB' for gb in sizes) + ' |\n'
          + '|---' * (3 + len(sizes)) + '|', flush=True)
    for name in memory.PLANS:
        for size in GPT2_SHAPES:
            found = spawn(place, '--work=cards', f'--init_from={size}', f'--plan={name}', '--compile=False',
                          '--batch_size=1', '--gradient_accumulation_steps=2')
            if isinstance(found, str): # the device itself is too small, or something is broken
                row = [found, *['' for gb in sizes]]
            else:
                held = [found['held_mb'].get(gb) for gb in sizes]
                row = [f"{found['predicted_mb'] / 1024:,.2f}",
                       *(f'{mb / 1024:.2f}' if mb else 'does not fit' for mb in held)]
            print(f"| {name} | {size} | {' | '.join(row)} |", flush=True)

# -----------------------------------------------------------------------------

WORKS = {'train': measure_training, 'sample': measure_sampling, 'batch': measure_batches,
         'cards': measure_cards}
if suite:
    run_suite()
    sys.exit(0)
try:
    result = WORKS[work]()
except RuntimeError as error:
    if not is_out_of_memory(error):
        raise
    raise ValueError("out of memory; type --plan=selective, recompute or offload, "
                     f"--batch_size={max(1, batch_size // 2)}, or --block_size with less") from None
if json:
    print(json_module.dumps(result))
else:
    for key, value in result.items():
        if value is not None:
            print(f"{key:<15} {f'{value:,.3f}' if isinstance(value, float) else value}")
