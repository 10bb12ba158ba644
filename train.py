"""
Trains a GPT-2: from scratch, from pretrained weights, or on from where a run stopped.

On one GPU, or on a CPU:
$ python train.py config/finetune/gpt2_small.py --batch_size=4
On the 4 GPUs of a machine:
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""
# -----------------------------------------------------------------------------
# options; the defaults train a GPT-2 (124M) on OpenWebText, as nanoGPT's do

# what to start from, and where to write
init_from = 'scratch' # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a model's path
out_dir = 'out' # for ckpt.pt (best), last.pt (latest), config.json, log.csv and loss.png
overwrite = False # start anew in an out_dir that already holds a run
# evaluation
eval_interval = 2000 # iterations from one evaluation to the next
eval_iters = 200 # batches of batch_size an evaluation takes from each split, 0 for the whole val split
eval_only = False # evaluate once, write nothing, and leave
always_save_checkpoint = True # save last.pt at each evaluation, not only at a new best
keep_checkpoints = False # also keep each evaluation's as iter_000500.pt
# logging
log_interval = 1 # iterations from one line to the next
wandb_log = False
wandb_project = 'fitgpt'
wandb_run_name = '' # out_dir, if empty
# data
dataset = 'openwebtext' # a folder in data/, or a path to one
batch_size = 12 # sequences a process holds at once, at the most
gradient_accumulation_steps = 40 # batches in an iteration, which is batch_size times this many sequences
block_size = 1024 # tokens in a sequence
# model, from scratch; another model brings its own shape
n_layer = 12
n_head = 12
n_embd = 768
bias = False # in the linear layers and layer norms
dropout = 0.0 # 0 is right for pretraining, 0.1 and more for finetuning
# optimizer
optimizer = 'adamw' # adamw, or muon (from scratch), which leaves all but the blocks' matrices to AdamW
learning_rate = 6e-4 # of AdamW, the peak
muon_learning_rate = 0.02 # of Muon, the peak
max_iters = 600000 # iterations of training, at the most
num_epochs = 0.0 # if given, an end after so many passes over the data, and warm-up in a tenth of it
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0 # the largest norm of the gradient, 0 for no limit
# learning rate schedule
decay_lr = True # warm up and decay; else learning_rate throughout
warmup_iters = 2000
lr_decay_iters = 0 # where the decay ends, 0 for max_iters
min_lr = 6e-5 # what learning_rate decays to; Muon's decays by the same factor
# machine
device = 'auto' # auto, cpu, cuda, cuda:1, mps
dtype = 'auto' # auto, float32, bfloat16, float16 (with a gradient scaler)
compile = 'auto' # auto (on CUDA), True, False
plan = 'auto' # auto, device, recompute, offload: what lies where, to fit; docs/memory.md has them
memory_gb = 0.0 # plan for a card of so many GiB, and use no more of it; 0 for what is free
dry_run = False # print what each plan would take, and leave
backend = 'auto' # of torch.distributed: auto, nccl, gloo
seed = 1337 # of the weights, of the order of the data and of dropout

from configurator import configure
config = configure(globals())

# -----------------------------------------------------------------------------
# set-up

import datetime
import math
import os
import signal
import sys
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint as checkpoints
import memory
from dataset import Split, find_dataset, read_tokenizer_state, split_batch
from device import (DTYPES, all_sum, autocast, compile_model, free_memory, is_out_of_memory, limit_memory,
                    memory_mb, peak_flops, pick_device, pick_dtype, start_processes, stop_processes)
from log import append_row, epoch_times, start_log
from model import GPT, GPT2_SHAPES, GPTConfig
from optim import get_lr, load_optimizer, make_optimizer, set_lr, weights
from plot import plot_run
from tokenizer import check_match, count_ids

for key in ('batch_size', 'gradient_accumulation_steps', 'block_size', 'eval_interval', 'log_interval'):
    if config[key] < 1:
        raise ValueError(f"{key} is {config[key]}; type --{key}=N with N at least 1")
for key, value in config.items():
    if type(value) in (int, float) and value < 0:
        raise ValueError(f"{key} is {value}; type --{key}=N with N at least 0")
if seed >= 2**32:
    raise ValueError(f"seed is {seed}; type --seed=N with N below 2**32")
if decay_lr and min_lr > learning_rate:
    raise ValueError(f"min_lr, {min_lr}, is above learning_rate, {learning_rate}; type "
                     f"--min_lr={learning_rate / 10:.3g}")
if max(beta1, beta2) >= 1:
    raise ValueError(f"beta1 and beta2 are {beta1} and {beta2}; type --beta1=0.9 --beta2=0.95, both below 1")

device, dtype = pick_device(device), pick_dtype(dtype, pick_device(device))
rank, world_size, device = start_processes(backend, device)
master = rank == 0
if device.startswith('cuda'):
    torch.set_float32_matmul_precision('high') # TF32 for what is float32
sys.stdout.reconfigure(line_buffering=True) # so that a line is seen at once in a file, too

if wandb_log:
    import wandb # here, so that its absence is told before anything is done
    if not hasattr(wandb, 'init'): # only a folder that runs left
        raise ImportError("wandb is not installed; run pip install wandb, or type --wandb_log=False")

def say(text):
    if master:
        print(text)

model = None
def leave(status):
    global model
    model = None # DDP holds on to the processes' group
    stop_processes(world_size)
    sys.exit(status)

sequences = batch_size * gradient_accumulation_steps # S: what an iteration trains on, on any machine
if sequences % world_size:
    low = sequences // world_size * world_size
    raise ValueError(f"an iteration has {sequences} sequences (batch_size * gradient_accumulation_steps), "
                     f"which {world_size} processes cannot share evenly; make it {low or world_size} or "
                     f"{low + world_size}")
share = sequences // world_size # of them, a process's

if master and not (eval_only or dry_run):
    if init_from != 'resume' and not overwrite and checkpoints.find(out_dir):
        raise FileExistsError(f"{out_dir} already holds a run; type --init_from=resume to go on with it, "
                              "--out_dir=ANOTHER to keep it, or --overwrite=True to lose it")

# -----------------------------------------------------------------------------
# memory

data_dir = find_dataset(dataset)
tokenizer = read_tokenizer_state(data_dir)
vocab_size = count_ids(tokenizer)
free = free_memory(device)
if memory_gb:
    free = memory.usable(memory_gb)
    limit_memory(device, free)

def shape_of(c):
    """ what the memory of this run depends on, for a model of GPTConfig c """
    with torch.device('meta'):
        n_params = GPT(c).num_params()
    half = dtype != 'float32' or device == 'cpu' and memory_gb > 0 # a card has half precision
    return memory.Shape(n_params, c.n_layer, c.n_head, c.n_embd, c.vocab_size, block_size, dropout, half)

if dry_run: # which needs neither data nor, for GPT-2, weights
    c = (GPTConfig(**GPT2_SHAPES[init_from]) if init_from in GPT2_SHAPES else
         GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=bias) if init_from == 'scratch' else
         checkpoints.load_model(out_dir if init_from == 'resume' else init_from)[0].config)
    say(memory.table(shape_of(c), share, batch_size, free, epoch_times(out_dir, config)))
    leave(0)

# -----------------------------------------------------------------------------
# data

train_data = Split(data_dir, 'train', block_size, vocab_size, seed)
val_data = Split(data_dir, 'val', block_size, vocab_size)
if num_epochs:
    max_iters = min(max_iters, max(1, round(num_epochs * train_data.windows / sequences)))
    warmup_iters = min(warmup_iters, max_iters // 10)
lr_decay_iters = lr_decay_iters or max_iters

def fetch(data, windows):
    """ inputs and targets (B, T) of some windows, on the device """
    x, y = map(torch.from_numpy, data.batch(windows))
    if device.startswith('cuda'): # pinned memory is copied while the GPU computes
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

# -----------------------------------------------------------------------------
# model

loaded = {} # what a checkpoint holds beside the weights
if init_from == 'scratch':
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
elif init_from == 'resume':
    path = checkpoints.find(out_dir, ('last.pt', 'ckpt.pt'))
    if path is None:
        raise FileNotFoundError(f"there is no checkpoint in {out_dir} to resume; type --out_dir with a run's "
                                "folder, or --init_from=scratch to start one")
    model, loaded = checkpoints.load_model(path, dropout)
else:
    model, loaded = checkpoints.load_model(init_from, dropout)
check_match(loaded.get('tokenizer'), model.config.vocab_size, tokenizer, dataset)
if block_size > model.config.block_size:
    raise ValueError(f"block_size is {block_size}, but the model has {model.config.block_size} positions; "
                     f"type --block_size={model.config.block_size} or less")

in_ram = device == 'cpu' and plan == 'auto' and not memory_gb # where offloading gains nothing
n_plans = 2 if optimizer == 'muon' or world_size > 1 or in_ram else 3
shape = shape_of(model.config)
plan, fits = memory.choose(plan, shape, share, batch_size, free, memory.PLANS[:n_plans], free_memory('cpu'))
micro_batch, n_micro_steps = split_batch(share, fits)
model.recompute = plan != 'device'
if plan != 'offload':
    model.to(device)
raw_model = model # without DDP

# -----------------------------------------------------------------------------
# optimizer

opt = make_optimizer(optimizer, model, learning_rate, muon_learning_rate, weight_decay, (beta1, beta2),
                     offload_to=(device, DTYPES[dtype]) if plan == 'offload' else None)
params = [p for group in opt.param_groups for p in group['params']]
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == 'float16')
iter_num, best_val_loss = 0, math.inf
if init_from == 'resume':
    iter_num = loaded.get('iter_num', 0)
    best_val_loss = float(loaded.get('best_val_loss', math.inf)) # a tensor in nanoGPT's
    if 'optimizer' in loaded:
        load_optimizer(opt, loaded['optimizer'])
    if loaded.get('scaler') and scaler.is_enabled():
        scaler.load_state_dict(loaded['scaler'])
    before, own = loaded.get('config', {}), ('n_layer', 'n_head', 'n_embd', 'bias') # the model's
    changed = [f"{key} {before[key]!r} -> {config[key]!r}" for key in config
               if key != 'init_from' and key not in own and before.get(key, config[key]) != config[key]]
    say(f"resuming at iteration {iter_num}" + (f", with {', '.join(changed)}" if changed else ''))
loaded = before = None # frees the moments, which the optimizer has copied

# -----------------------------------------------------------------------------
# compile and DDP

def one_step():
    x, y = fetch(train_data, train_data.cut(np.zeros(micro_batch, int)))
    with autocast(device, dtype, cache=plan == 'device'):
        model(x, y)[1].backward()

is_compiled = compile_model(model, compile, device, one_step)
opt.zero_grad(set_to_none=True)
if world_size > 1:
    model = DistributedDataParallel(raw_model, device_ids=[device] if device.startswith('cuda') else None)

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate():
    """ the mean loss of each split, over evenly spread windows that the processes share """
    losses = {}
    raw_model.eval()
    for name, data in (('train', train_data), ('val', val_data)):
        windows = data.evaluation_windows(eval_iters * batch_size or val_data.windows)
        total = torch.zeros((), device=device)
        for batch in data.batches(windows[rank::world_size], micro_batch):
            x, y = fetch(data, batch)
            with autocast(device, dtype):
                total += raw_model(x, y, scale=1.0)[1]
        losses[name] = all_sum([total.item()], world_size, device)[0] / int(windows[:, 1].sum())
    raw_model.train()
    return losses

# -----------------------------------------------------------------------------
# logging

def log(row):
    append_row(out_dir, row)
    if 'val_loss' in row:
        try:
            plot_run(out_dir)
        except (ImportError, OSError, ValueError, KeyError) as error: # a picture is not worth a run
            say(f"no loss.png: {error}; python plot.py {out_dir} draws it later")
    if wandb_log:
        wandb.log({k: v for k, v in row.items() if v is not None}, step=row['iter'])

def save(is_best):
    """ write last.pt, and let ckpt.pt be the same file where it is the best """
    last = os.path.join(out_dir, 'last.pt')
    checkpoints.save({
        'model': weights(raw_model, opt), 'optimizer': opt.state_dict(),
        'model_args': checkpoints.model_args(raw_model), 'iter_num': iter_num, 'best_val_loss': best_val_loss,
        'config': config, 'tokenizer': tokenizer, 'scaler': scaler.state_dict()}, last)
    if is_best:
        checkpoints.link(last, os.path.join(out_dir, 'ckpt.pt'))
    if keep_checkpoints:
        checkpoints.link(last, os.path.join(out_dir, f'iter_{iter_num:06d}.pt'))

say(f"{raw_model.num_params():,} parameters, on {f'{world_size} x ' if world_size > 1 else ''}{device} "
    f"in {dtype}{', compiled' if is_compiled else ''}")
say(f"{len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} to validate on")
say(f"an iteration is {sequences} sequences of {block_size} tokens, {sequences * block_size:,} tokens; "
    f"{max_iters:,} iterations are {max_iters * sequences / train_data.windows:.1f} epochs")
say(memory.describe(plan, shape, micro_batch, n_micro_steps > 1, free))
if eval_only:
    losses = evaluate()
    say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    leave(0)
if iter_num >= max_iters and init_from == 'resume':
    say(f"{out_dir} is trained to iteration {iter_num} already; type "
        f"--{'num_epochs' if num_epochs else 'max_iters'}=N "
        "with a larger N to go on")
    leave(0)
if master and wandb_log:
    try:
        wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=config)
    except Exception as error: # no key, no network
        raise OSError(f"wandb does not start ({error}); run wandb login, or set WANDB_MODE=offline") from None
if master:
    start_log(out_dir, {**config, 'device': device, 'dtype': dtype, 'plan': plan, 'max_iters': max_iters,
                        'warmup_iters': warmup_iters, 'lr_decay_iters': lr_decay_iters,
                        'model_args': checkpoints.model_args(raw_model)},
              resume_at=iter_num if init_from == 'resume' else None)

# -----------------------------------------------------------------------------
# loop

stop, stop_time = 0, 0.0 # the signal that asked for an end, and when

def ask_to_stop(number, frame):
    global stop, stop_time
    if stop: # torchrun passes on a signal that this process got as well: what comes at once is the same one
        if number == signal.SIGINT and time.time() > stop_time + 1:
            os._exit(130)
        return
    stop, stop_time = number, time.time()
    say("stopping after this iteration; a second Ctrl-C leaves at once")

def accumulate(windows, n_targets):
    """ make the gradients of an iteration, and return its loss, or this process's share of it """
    # a share of the mean over the targets of all processes, over which DDP takes another mean
    scale = scaler.scale(torch.tensor(world_size / n_targets, device=device))
    loss = torch.zeros((), device=device)
    mine = windows.reshape(world_size, n_micro_steps, micro_batch, 2)[rank]
    for micro_step in range(n_micro_steps):
        x, y = fetch(train_data, mine[micro_step])
        if dropout: # seeded by the number of its first sequence, so that a resumed run draws the same
            step = (iter_num * world_size + rank) * n_micro_steps + micro_step
            torch.manual_seed(seed + step * micro_batch)
        if world_size > 1: # the processes exchange gradients once, in the last backward
            model.require_backward_grad_sync = micro_step == n_micro_steps - 1
        with autocast(device, dtype, cache=plan == 'device'):
            _, micro_loss = model(x, y, scale=scale)
        micro_loss.backward()
        loss += micro_loss.detach() / (scale * n_targets)
    return loss

def with_room(work, *args):
    """ work(*args), again with smaller micro-batches where there is no room: they give the same result """
    global micro_batch, n_micro_steps
    while True:
        try:
            return work(*args)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        opt.zero_grad(set_to_none=True)
        if micro_batch == 1 or world_size > 1: # the other processes do not know
            raise ValueError(memory.advice(plan, micro_batch, block_size))
        was = micro_batch
        micro_batch, n_micro_steps = split_batch(share, micro_batch // 2)
        say(f"iter {iter_num}: out of memory with {was} sequences at a time; again with {micro_batch}")

signal.signal(signal.SIGINT, ask_to_stop)
signal.signal(signal.SIGTERM, ask_to_stop)

flops_per_iter = raw_model.flops_per_token(block_size) * sequences * block_size
peak = peak_flops(device, dtype)
start_time, start_iter = time.time(), iter_num
n_bad = 0 # iterations in a row that were not finite
while True:
    # once in a while: evaluate and save
    row = {'iter': iter_num, 'epoch': round(iter_num * sequences / train_data.windows, 4)}
    if iter_num % eval_interval == 0 or iter_num == max_iters:
        losses = with_room(evaluate)
        row.update(train_loss=losses['train'], val_loss=losses['val'])
        # equal, after a resume: the run may have died between last.pt and ckpt.pt
        is_best = losses['val'] < best_val_loss or losses['val'] == best_val_loss and iter_num == start_iter
        best_val_loss = min(losses['val'], best_val_loss)
        say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
            f"{', the best so far' if is_best else ''}")
        if master and (is_best or always_save_checkpoint or iter_num == max_iters):
            save(is_best)
    if iter_num == max_iters:
        if master:
            log(row)
        break

    # one step: accumulate, clip, update
    t0 = time.time()
    lr = get_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr else learning_rate
    set_lr(opt, lr / (learning_rate or 1))
    windows = train_data.training_windows(iter_num, sequences)
    n_targets = int(windows[:, 1].sum())
    loss = with_room(accumulate, windows, n_targets)
    if plan == 'offload':
        opt.collect()
    scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
    loss, n_stopping = all_sum([loss.item(), float(stop > 0)], world_size, device)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    # a scaled gradient that overflows is float16's everyday business
    overflow = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1
    n_bad = 0 if finite or overflow else n_bad + 1
    if finite or scaler.is_enabled(): # the scaler steps over what is not finite, and scales less
        scaler.step(opt)
        scaler.update()
    if not finite:
        say(f"iter {iter_num}: loss {loss}, gradient norm {grad_norm}; no update")
    if n_bad == 5:
        if master:
            save(is_best=False)
        raise ValueError(f"five iterations in a row were not finite, up to {iter_num}; {out_dir}/last.pt "
                         "holds the run as it was before them; type --init_from=resume with a lower "
                         "--learning_rate or --dtype=float32")
    opt.zero_grad(set_to_none=True)
    dt = time.time() - t0

    # report: everything below is only bookkeeping
    if iter_num % log_interval == 0 or 'val_loss' in row:
        mfu = flops_per_iter / dt / (peak * world_size) if peak else None
        row.update(loss=loss, lr=lr, grad_norm=grad_norm, time_ms=round(dt * 1000, 3), mfu=mfu,
                   tokens_per_sec=round(sequences * block_size / dt, 1),
                   memory_mb=round(memory_mb(device), 1))
        left = (time.time() - start_time) / (iter_num + 1 - start_iter) * (max_iters - iter_num - 1)
        if master:
            log(row)
        say(f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, {f'mfu {mfu:.2%}, ' if mfu else ''}"
            f"{row['tokens_per_sec']:,.0f} tok/s, epoch {row['epoch']:.2f}, eta "
            f"{datetime.timedelta(seconds=round(left))}")
    iter_num += 1
    if n_stopping:
        if master:
            save(is_best=False)
        break

# -----------------------------------------------------------------------------
# finish

say(f"{'stopped' if stop else 'finished'} at iteration {iter_num} after "
    f"{datetime.timedelta(seconds=round(time.time() - start_time))}")
say(f"the best val loss, {best_val_loss:.4f}, is that of {out_dir}/ckpt.pt; the latest is {out_dir}/last.pt")
say(f"next: python sample.py --out_dir={out_dir}" + (
    ", or the same command as before with --init_from=resume" if iter_num < max_iters else ''))
if master and wandb_log:
    wandb.finish()
leave(130 if stop == signal.SIGINT else 0)
