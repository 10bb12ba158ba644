"""
Trains GPT-2: from scratch, from pretrained weights, or from where an earlier run stopped.

On one GPU, or on a CPU, after python data/quickstart/prepare.py:
$ python train.py config/quickstart.py
On the 4 GPUs of a machine:
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""
# -----------------------------------------------------------------------------
# options; the defaults train a GPT-2 (124M) on OpenWebText, as nanoGPT's do

# what to start from, and where to write
init_from = 'scratch' # scratch, resume, gpt2, gpt2-medium, -large, -xl, a hub id (or id@revision), or a path
out_dir = 'out' # folder for ckpt.pt (best), last.pt (latest), config.json, log.csv, loss.png and report.md
overwrite = False # delete the checkpoints of the run that out_dir holds, and start a new one there
# evaluation
eval_interval = 2000 # iterations between evaluations
eval_iters = 200 # batches of batch_size to evaluate on each split; 0 for all of val, and as many of train
eval_only = False # evaluate once, write nothing, and exit
patience = 0 # stop after this many evaluations in a row without a new best; 0 for no limit
always_save_checkpoint = True # save last.pt at every evaluation, not only at a new best
keep_checkpoints = False # save at every evaluation, and keep each checkpoint, named like iter_000500.pt
# logging
log_interval = 1 # iterations between log lines
wandb_log = False # also send the rows of log.csv to wandb
wandb_project = 'fitgpt' # wandb project to log to
wandb_run_name = '' # name of the run in wandb; out_dir if empty
sample_interval = 0 # iterations between samples written to samples.txt; 0 for none
sample_start = '\n' # prompt of the samples in samples.txt
sample_tokens = 200 # tokens in each of these samples
# data
dataset = 'openwebtext' # a folder in data/, a path to a folder, or a mixture such as novel:0.7,letters:0.3
batch_size = 12 # sequences that a process handles at once, or fewer if they do not fit
gradient_accumulation_steps = 40 # an iteration trains on batch_size times this many sequences
block_size = 1024 # tokens per sequence
# model (a loaded one keeps its own n_layer, n_head, n_embd and bias)
n_layer = 12 # transformer blocks
n_head = 12 # attention heads per block
n_embd = 768 # channels; a multiple of n_head
bias = False # biases in the linear layers and layer norms
dropout = 0.0 # share of activations dropped in training; 0 for pretraining, 0.1 or more for finetuning
# what to train of a model
freeze = '' # parts to leave untrained, such as wte,wpe,h.0-5; empty for none
lora_rank = 0 # train only two matrices of this rank beside each of lora_targets; 0 for no LoRA
lora_alpha = 32.0 # the product of the two matrices is scaled by lora_alpha / lora_rank
lora_dropout = 0.0 # dropout on the input of the two matrices
lora_targets = 'attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj' # the matrices of a block that get LoRA
# optimizer
optimizer = 'adamw' # adamw; or muon for the blocks' matrices and adamw for the rest, not with LoRA
learning_rate = 6e-4 # peak learning rate of AdamW
muon_learning_rate = 0.02 # peak learning rate of Muon
max_iters = 600000 # maximum number of training iterations
num_epochs = 0.0 # if given, stop after this many passes over the data, with warm-up in at most a tenth
weight_decay = 1e-1 # applied to matrices, not to vectors
beta1 = 0.9 # decay rate of AdamW's mean of the gradient
beta2 = 0.95 # decay rate of AdamW's mean of the squared gradient
grad_clip = 1.0 # clip the norm of the gradient to this; 0 for no clipping
# learning rate schedule
decay_lr = True # warm up and decay the learning rate; if False, keep it constant
warmup_iters = 2000 # iterations over which learning_rate rises to its peak
lr_decay_iters = 0 # iteration at which the decay ends; 0 for max_iters
min_lr = 6e-5 # final value of learning_rate; Muon's decays by the same factor
# machine
device = 'auto' # auto, cpu, cuda, cuda:1, mps
dtype = 'auto' # auto, float32, bfloat16, float16 (with a gradient scaler)
compile = 'auto' # auto (only on CUDA), True, False
plan = 'auto' # auto, device, selective, recompute, offload: what is kept where, see docs/memory.md
memory_gb = 0.0 # on CUDA use only so many GiB, 0.6 of them its own; elsewhere plan for them; 0 for all free
dry_run = False # print the memory that each plan would take, and exit
shard = False # divide weights, gradients and moments among torchrun's processes, for a model too big for one
backend = 'auto' # torch.distributed backend: auto, nccl, gloo
seed = 1337 # for the weights, the order of the data, and dropout

from configurator import configure
config = configure(globals(), resumes=True, at_least_1=(
    'batch_size', 'gradient_accumulation_steps', 'block_size', 'eval_interval', 'log_interval'))

# -----------------------------------------------------------------------------
# set-up

import math
import sys
import time

import torch

import checkpoint as checkpoints
import lora
import memory
import optim
import parallel
from dataset import find_datasets, open_split, read_shared_state, read_template, tell_assumed
from device import (DTYPES, Signals, autocast, compile_model, describe_machine, fetch, free_memory,
                    is_out_of_memory, memory_mb, memory_to_fill, peak_flops, pick_compile, pick_device,
                    pick_dtype, train_fast)
from log import (Best, Clock, append_row, append_sample, epoch_times, finish_log, is_logged, need_wandb,
                 start_log, start_wandb, steady_output)
from model import GPT, check_length
from saver import Saver
from tokenizer import check_match, count_ids, from_state

optim.check_options(config)
device = pick_device(device)
compile = pick_compile(compile, device)
rank, world_size, device = parallel.start_processes(backend, device)
dtype = parallel.agree(pick_dtype(dtype, device), list(DTYPES))
master = rank == 0
train_fast(device, dropout) # on CUDA: TF32, and without dropout cuDNN's attention
steady_output() # flush each line, even to a file, and survive a full disk under it
if wandb_log:
    need_wandb() # fail here, before any work is done, if it is missing
say = print if master else lambda text: None # one process tells what all do

def leave(status):
    global model
    model = None # DDP keeps a reference to the process group
    parallel.stop_processes()
    sys.exit(status)

sequences = batch_size * gradient_accumulation_steps # S: sequences per iteration, on any machine
share = parallel.share(sequences, world_size, config) # sequences per process

signals, launch, saver = Signals(say), parallel.launch_id(), Saver(out_dir, keep_checkpoints)
if parallel.in_any(checkpoints.is_of(out_dir, launch)): # torchrun lost a process, and has restarted all
    init_from = 'resume'
if init_from == 'resume':
    checkpoints.to_resume(out_dir) # first: without that run's options, a later error would mislead
elif not (eval_only or dry_run):
    checkpoints.check_new(out_dir, init_from, overwrite)

# -----------------------------------------------------------------------------
# memory

folders = find_datasets(dataset)
tokenizer, template = read_shared_state(folders), read_template(folders) # of instructions, or None
vocab_size = count_ids(tokenizer)
elsewhere = dry_run and memory_gb > 0 # plan for a card of that size, which need not be here
place = 'cuda' if elsewhere else device
budget = parallel.least(memory_to_fill(device, memory_gb, elsewhere)) # the same plan for all
plans = memory.plans_for(config, place, world_size)

model_config = checkpoints.config_of(init_from, out_dir, {**config, 'vocab_size': vocab_size}, say)
check_length(block_size, model_config.block_size)
with torch.device('meta'): # shapes only: there are no weights yet
    model = GPT(model_config)
    lora.restrict(model, config) # freeze parts and add LoRA, as the options say
half = dtype != 'float32' or elsewhere and config['dtype'] == 'auto' # on a card, auto is never float32
shape = memory.shape_of(model, block_size, dropout, half, lora=lora_rank > 0, muon=optimizer == 'muon',
                        processes=world_size, shard=shard, device=place,
                        adapts=init_from not in ('scratch', 'resume') and not freeze)
if dry_run: # needs neither data nor weights
    epochs = epoch_times(out_dir, {**config, 'device': place, 'processes': world_size})
    say((tell_assumed(folders) if init_from == 'scratch' else '')
        + memory.table(shape, share, batch_size, budget, epochs, plans, free_memory('cpu'), world_size))
    leave(0)

ram_free = math.inf if eval_only else free_memory('cpu') # before the model takes any
plan, at_once = memory.choose(plan, shape, share, batch_size, budget, plans, ram_free, not eval_only)
micro_batch, n_micro_steps = memory.split_batch(share, at_once)
if not eval_only or plan == 'offload':
    say(memory.describe(plan, shape, at_once, at_once < share, budget, ram_free))

# -----------------------------------------------------------------------------
# data

train_data = open_split(folders, 'train', block_size, vocab_size, seed=seed)
val_data = open_split(folders, 'val', block_size, vocab_size)
n_evaluated = eval_iters * batch_size or val_data.n_windows # windows per split
check_match(None, model_config.vocab_size, tokenizer, dataset) # before weights are fetched
judged = f'{min(n_evaluated, val_data.n_windows)} x {block_size} evaluated'
config['data'] = f'{train_data.mark()} {val_data.mark()}, {judged}' # a resumed run compares it
parallel.check_data(config['data'], dataset)
evaluated = { # chosen now, since this raises ValueError if a mask leaves no targets
    'train': train_data.evaluation_parts(n_evaluated), 'val': val_data.evaluation_parts(n_evaluated)}
if num_epochs:
    max_iters = round(min(max_iters, max(1, num_epochs * train_data.n_windows / sequences)))
    warmup_iters = min(warmup_iters, max_iters // 10)
lr_decay_iters = lr_decay_iters or max_iters

# -----------------------------------------------------------------------------
# model

loaded = {} # what a checkpoint holds besides the weights
if init_from == 'scratch':
    torch.manual_seed(seed)
    model = GPT(model_config)
elif init_from == 'resume':
    model, loaded = checkpoints.resume(out_dir, config, say)
else:
    model, loaded = checkpoints.load_model(init_from, dropout)
check_match(loaded.get('tokenizer'), model.config.vocab_size, tokenizer, dataset)
template = template or loaded.get('template')
base = checkpoints.describe_base(init_from, model, lora_rank > 0, loaded)
lora.restrict(model, config)
if lora_rank:
    lora.shrink(model, DTYPES[dtype])

def with_room(work, *args, repeatable=True, leaner=plans): # leaner: those that its error may name
    """ run work(*args); when out of memory, retry with smaller micro-batches, which change only dropout """
    global micro_batch, n_micro_steps
    while True:
        try:
            return work(*args)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if not repeatable or world_size > 1: # other processes would not repeat it
            break
        opt.zero_grad(set_to_none=True)
        if micro_batch == 1:
            if saver.saved is not None: # bring this run's checkpoint up to date
                save()
            break
        was, (micro_batch, n_micro_steps) = micro_batch, memory.split_batch(share, micro_batch // 2)
        say(f"iter {iter_num}: out of memory with {was} sequences at a time; again with {micro_batch}")
    raise ValueError(memory.advice(
        plan, micro_batch, config, plans=leaner, works=repeatable,
        shards=not shard and parallel.can_shard(world_size, config),
        saved=saver.saved is not None or init_from == 'resume'))

model.follow(plan)
if shard:
    with_room(parallel.shard_model, model, world_size, device, repeatable=False)
elif plan != 'offload':
    with_room(model.to, device, repeatable=False)
raw_model = model # not wrapped in DDP

# -----------------------------------------------------------------------------
# optimizer, compiler and DDP

offload_to = (device, DTYPES[dtype]) if plan == 'offload' else None
opt = with_room(optim.make_optimizer, optimizer, model, learning_rate, muon_learning_rate, weight_decay,
                (beta1, beta2), offload_to, dtype != 'bfloat16', repeatable=False) # WideMuon if so
updates_on = next(p.device for group in opt.param_groups for p in group['params'])
scaler = torch.amp.GradScaler(updates_on.type, enabled=dtype == 'float16')
iter_num, best, n_bad = 0, Best(), 0 # n_bad: iterations in a row that were not finite
if init_from == 'resume':
    iter_num, best, n_bad = loaded.get('iter_num', 0), Best.of(loaded), loaded.get('n_bad', 0)
    say(f"resuming at iteration {iter_num}{checkpoints.tell_changes(loaded.get('config', {}), config)}")
    if loaded.get('scaler'):
        scaler.load_state_dict(loaded['scaler'])
parallel.check_same(iter_num, out_dir)

def one_step(model=raw_model): # to try the compiler, and to make DDP's buckets
    x, y = fetch(*train_data.batch(train_data.training_windows(0, micro_batch)), device)
    with autocast(device, dtype):
        model(x, y)[1].backward()

# compile each block on its own, so that backward releases gradients as it goes and memory stays as planned
is_compiled = compile and not eval_only and with_room(compile_model, model.compiled_parts(), one_step)
opt.zero_grad(set_to_none=True)
if world_size > 1 and not shard and not eval_only:
    model = with_room(parallel.replicate_model, raw_model, device, one_step)
if 'optimizer' in loaded: # a resumed run's, unless it only evaluates
    with_room(optim.load_optimizer, opt, loaded.pop('optimizer'), repeatable=False)

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate():
    """ the mean loss of each split over fixed windows, which the processes share; None if told to stop """
    losses = {'train': 0.0, 'val': 0.0}
    raw_model.eval()
    for name, data in (('train', train_data), ('val', val_data)):
        for weight, windows, n in evaluated[name]:
            parts = [] # on the device, so that Python need not wait for each
            for batch in data.batches(windows, micro_batch * world_size):
                if parallel.all_sum(signals.asked())[0]:
                    return None
                x, y = fetch(*data.batch(batch[rank::world_size]), device)
                with autocast(device, dtype):
                    parts.append(raw_model(x, y, scale=1.0)[1]) # a sum
            losses[name] += weight * parallel.all_sum([sum(part.item() for part in parts)])[0] / n
    raw_model.train()
    return losses

# -----------------------------------------------------------------------------
# logging

def save(is_best=None):
    """ write last.pt and, if it is the best (None: it was not evaluated), make ckpt.pt the same file; return
    whether that succeeded """
    state = checkpoints.adapter_state(raw_model) if lora_rank else {'model': optim.weights(raw_model, opt)}
    moments = parallel.whole(opt.state_dict())
    done = parallel.in_any(master and saver({
        **base, **state, 'optimizer': moments, 'model_args': checkpoints.model_args(raw_model),
        'iter_num': iter_num, **vars(best), 'config': config, 'tokenizer': tokenizer, 'template': template,
        'scaler': scaler.state_dict(), 'n_bad': n_bad, 'launch': launch}, is_best))
    saver.saved = iter_num if done else saver.saved # known to every process, since each may report it
    return done

def write_sample():
    """ generate a text with the current model and append it to samples.txt """
    raw_model.eval()
    torch.manual_seed(seed)
    try:
        with autocast(device, dtype, cache=not shard), torch.compiler.set_stance('force_eager'):
            made = raw_model.generate(prompt, sample_tokens, 0.8, top_k=200, n_vocab=vocab_size, fixed=False)
    except RuntimeError as error:
        if shard or not is_out_of_memory(error): # the other processes of a sharded run would wait
            raise
        return say(f"iter {iter_num}: out of memory for a sample, so none is written")
    finally:
        raw_model.train()
    if master:
        append_sample(out_dir, iter_num, coder.decode(made[0].tolist()))

def log_evaluation():
    """ log the last evaluation, unless its iteration has done so """
    if master and row['iter'] == iter_num and 'val_loss' in row:
        append_row(out_dir, row, wandb_log)

if sample_interval:
    coder = from_state(tokenizer)
    prompt = torch.tensor([coder.encode(sample_start, allow_special=True) or [coder.first]], device=device)
n_trained = raw_model.num_params(trained=True)
some = f", {n_trained:,} of them to train" if lora_rank or freeze else ''
where = f"{world_size} x {device}" if world_size > 1 else device
say(f"{raw_model.num_params():,} parameters{some}, on {where} in {dtype}"
    f"{', compiled' if is_compiled else ''}{', sharded' if shard else ''}")
say(f"{train_data.n_tokens:,} tokens to train on, {val_data.n_tokens:,} to validate on")
say(f"an iteration is {memory.count(sequences)} of {block_size} tokens, {sequences * block_size:,} tokens; "
    f"{max_iters:,} iterations are {train_data.describe_epochs(max_iters * sequences)}"
    + optim.doubts(config, max_iters, warmup_iters, max_iters * sequences / train_data.n_windows))
if eval_only:
    losses = with_room(evaluate, leaner=plans[3:])
    say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    leave(0)
if iter_num >= max_iters and init_from == 'resume' and is_logged(out_dir, iter_num):
    say(f"{out_dir} is trained to iteration {iter_num} already; type "
        f"--{'num_epochs' if max_iters < config['max_iters'] else 'max_iters'}=N with a larger N to go on")
    leave(0)

def begin():
    saver.lock()
    wandb_id = start_wandb(config, init_from == 'resume')
    start_log(out_dir, config, dict(
        wandb_id=wandb_id, device=device, dtype=dtype, plan=plan, processes=world_size, max_iters=max_iters,
        warmup_iters=warmup_iters, lr_decay_iters=lr_decay_iters, machine=describe_machine(device),
        parameters=raw_model.num_params(), trained=n_trained, model_args=checkpoints.model_args(raw_model)),
        resume_at=iter_num if init_from == 'resume' else None)
    saver.clear(anew=overwrite and init_from != 'resume') # last, once nothing can stop the run from starting
parallel.in_first(begin)

# -----------------------------------------------------------------------------
# loop

def accumulate(windows, n_targets):
    """ compute an iteration's gradients; return its loss, or this process's part; None if told to stop """
    # micro-batches must add up to the mean over n_targets, and DDP divides by world_size
    scale = scaler.scale(torch.full((), world_size / n_targets, device=updates_on)).to(device)
    loss = torch.zeros((), device=device)
    mine = windows.reshape(world_size, n_micro_steps, micro_batch, 2)[rank] # 2: start, length
    for micro_step in range(n_micro_steps):
        if signals.end and world_size == 1: # several processes would have to agree
            return None
        x, y = fetch(*train_data.batch(mine[micro_step]), device)
        # for dropout: the number of the first sequence, so that a resumed run draws the same
        torch.manual_seed(seed + iter_num * sequences + rank * share + micro_step * micro_batch)
        if model is not raw_model: # DDP exchanges gradients once, in the last backward
            model.require_backward_grad_sync = micro_step == n_micro_steps - 1
        with autocast(device, dtype):
            _, micro_loss = model(x, y, scale=scale)
        micro_loss.backward()
        loss += micro_loss.detach() / (scale * n_targets) # its losses' sum / n_targets
        if plan == 'offload':
            opt.collect() # or the last gradients would still be on the device during the next loss
    return loss

signals.listen()
clock = Clock(sequences * block_size, raw_model.flops_per_token(block_size) * sequences * block_size,
              (peak_flops(device, dtype) or 0) * world_size, max_iters)
ended = False # whether the run is complete
while True:
    # once in a while: evaluate and save
    row = {'iter': iter_num, 'epoch': round(iter_num * sequences / train_data.n_windows, 4)}
    if iter_num % eval_interval == 0 or iter_num >= max_iters:
        losses = with_room(evaluate, leaner=plans[3:]) # of leaner plans, only offload helps
        if losses is None:
            break
        row.update(train_loss=losses['train'], val_loss=losses['val'])
        before, (best, is_best) = best, best.after(iter_num, losses['val'])
        say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
            f"{', the best so far' if is_best else ''}")
        ended = iter_num >= max_iters or 0 < patience <= best.n_worse
        if is_best or always_save_checkpoint or keep_checkpoints or ended:
            best = best if save(is_best) else best.without(before) # not saved, it does not count
    if sample_interval and iter_num % sample_interval == 0 and (master or shard):
        write_sample()
    if ended:
        break

    # one step: accumulate, clip, update
    t0 = time.perf_counter()
    lr = (optim.get_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr
          else learning_rate)
    optim.set_lr(opt, lr / (learning_rate or 1)) # a factor, since Muon has a peak of its own
    windows = train_data.training_windows(iter_num, sequences)
    n_targets = max(1, train_data.count(windows)) # the count is 0 if a mask leaves none
    loss = with_room(accumulate, windows, n_targets)
    if loss is None:
        break
    scaler.unscale_(opt)
    grad_norm = optim.clip_gradients(opt, grad_clip or math.inf)
    loss, n_ending, n_saving = parallel.all_sum([loss.item(), *signals.asked()])
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    overflow = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1 # usual in float16
    n_bad = 0 if finite or overflow else n_bad + 1
    if finite:
        with_room(scaler.step, opt, repeatable=False) # the first step allocates AdamW's moments
    scaler.update() # in float16, back off after a non-finite gradient
    if not finite:
        say(f"iter {iter_num}: loss {loss}, gradient norm {grad_norm}; no update")
    if n_bad >= 5:
        n_bad = 0 # a resumed run may have five more
        save()
        log_evaluation()
        raise ValueError(f"five iterations in a row were not finite, the last being {iter_num}; "
                         + checkpoints.way_back(out_dir, dtype))
    opt.zero_grad(set_to_none=model is raw_model) # under DDP, gradients must stay in its buckets

    # report: everything below is only bookkeeping
    if iter_num % log_interval == 0 or 'val_loss' in row:
        speed, text = clock.lap(iter_num, row['epoch'], time.perf_counter() - t0)
        row.update(speed, loss=loss, lr=lr, grad_norm=grad_norm, memory_mb=round(memory_mb(device), 1))
        if master:
            append_row(out_dir, row, wandb_log)
        say(f"iter {iter_num}: loss {loss:.4f}, {text}")
    iter_num += 1
    if n_ending:
        break
    if n_saving:
        signals.save = False
        save()

# -----------------------------------------------------------------------------
# finish

log_evaluation()
if not ended:
    opt.zero_grad(set_to_none=True) # drop a partial iteration, which a resume begins again
    save()
say(f"{'finished' if ended else 'stopped'} at iteration {iter_num} after {clock.passed()}")
if master:
    finish_log(wandb_log)
    saver.check()
say(best.describe(out_dir, iter_num, max_iters, ended, asked=template is not None))
leave(signals.status())
