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
init_from = 'scratch' # scratch, resume, gpt2, gpt2-medium, -large, -xl, a hub id (or id@revision), or a path
out_dir = 'out' # for ckpt.pt (best), last.pt (latest), config.json, log.csv, loss.png and report.md
overwrite = False # start anew in an out_dir that already holds a run
# evaluation
eval_interval = 2000 # iterations from one evaluation to the next
eval_iters = 200 # batches of batch_size an evaluation takes from each split, 0 for the whole val split
eval_only = False # evaluate once, write nothing, and leave
patience = 0 # evaluations in a row without a new best that end the run, 0 for no such end
always_save_checkpoint = True # save last.pt at each evaluation, not only at a new best
keep_checkpoints = False # save at each evaluation, and keep it as iter_000500.pt, too
# logging
log_interval = 1 # iterations from one line to the next
wandb_log = False # send the rows of log.csv to wandb, too
wandb_project = 'fitgpt' # where wandb files the run
wandb_run_name = '' # what wandb calls it; out_dir, if empty
sample_interval = 0 # iterations from one text in samples.txt to the next, 0 for none
sample_start = '\n' # what such a text begins with
sample_tokens = 200 # how far it goes on
# data
dataset = 'openwebtext' # a folder in data/, a path to one, or a mixture, such as novel:0.7,letters:0.3
batch_size = 12 # sequences a process holds at once, at the most
gradient_accumulation_steps = 40 # batches in an iteration, which is batch_size times this many sequences
block_size = 1024 # tokens in a sequence
# model, from scratch; another model brings its own shape
n_layer = 12 # blocks
n_head = 12 # attention heads in a block
n_embd = 768 # channels, which n_head divides
bias = False # in the linear layers and layer norms
dropout = 0.0 # 0 is right for pretraining, 0.1 and more for finetuning
# what to train of a model
freeze = '' # parts that stay as they are, such as wte,wpe,h.0-5; empty for none
lora_rank = 0 # train two matrices of this rank beside each of lora_targets, and nothing else; 0 for no LoRA
lora_alpha = 32.0 # their product counts lora_alpha / lora_rank times
lora_dropout = 0.0 # of what enters them
lora_targets = 'attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj' # which of a block's matrices
# optimizer
optimizer = 'adamw' # adamw, or muon for the blocks' matrices of a model that it trained from scratch
learning_rate = 6e-4 # of AdamW, the peak
muon_learning_rate = 0.02 # of Muon, the peak
max_iters = 600000 # iterations of training, at the most
num_epochs = 0.0 # if given, an end after so many passes over the data, and warm-up in a tenth of it
weight_decay = 1e-1 # of matrices, not of vectors
beta1 = 0.9 # AdamW's memory of the gradient
beta2 = 0.95 # and of its square
grad_clip = 1.0 # the largest norm of the gradient, 0 for no limit
# learning rate schedule
decay_lr = True # warm up and decay; else learning_rate throughout
warmup_iters = 2000 # iterations in which learning_rate rises to its peak
lr_decay_iters = 0 # where the decay ends, 0 for max_iters
min_lr = 6e-5 # what learning_rate decays to; Muon's decays by the same factor
# machine
device = 'auto' # auto, cpu, cuda, cuda:1, mps
dtype = 'auto' # auto, float32, bfloat16, float16 (with a gradient scaler)
compile = 'auto' # auto (on CUDA), True, False
plan = 'auto' # auto, device, selective, recompute, offload: what is kept where; docs/memory.md has them
memory_gb = 0.0 # plan for a card of so many GiB, and use no more of it; 0 for what is free
dry_run = False # print what each plan would take, and leave
shard = False # share weights, gradients and moments among the processes, for a model too big for each
backend = 'auto' # of torch.distributed: auto, nccl, gloo
seed = 1337 # of the weights, of the order of the data and of dropout

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
import parallel
from dataset import find_datasets, open_split, read_shared_state, read_template, tell_assumed
from device import (DTYPES, Signals, autocast, compile_model, describe_machine, fetch, free_memory,
                    is_out_of_memory, memory_mb, memory_to_fill, peak_flops, pick_device, pick_dtype)
from log import (Best, Clock, append_row, append_sample, epoch_times, finish_log, is_logged, need_wandb,
                 start_log, start_wandb, steady_output)
from model import GPT, GPTConfig, check_length
from optim import clip_gradients, get_lr, load_optimizer, make_optimizer, set_lr, weights
from saver import Saver
from tokenizer import check_match, count_ids, from_state

if decay_lr and min_lr > learning_rate:
    raise ValueError(f"min_lr, {min_lr}, is above learning_rate, {learning_rate}; type "
                     f"--min_lr={learning_rate / 10:.3g}")

device = pick_device(device)
dtype = pick_dtype(dtype, device)
rank, world_size, device = parallel.start_processes(backend, device)
master = rank == 0
if device.startswith('cuda'):
    torch.set_float32_matmul_precision('high') # TF32 for what is float32
steady_output() # a line is seen at once in a file, too, and a full disk under it ends no run
need_wandb(wandb_log) # here, so that its absence is told before anything is done
say = print if master else lambda text: None

def leave(status):
    global model
    model = None # DDP holds on to the processes' group
    parallel.stop_processes(world_size)
    sys.exit(status)

sequences = batch_size * gradient_accumulation_steps # S: what an iteration trains on, on any machine
share = parallel.share(sequences, world_size, config) # of them, a process's
parallel.check_shard(world_size, config)

signals, launch, saver = Signals(say), parallel.launch_id(), Saver(out_dir, keep_checkpoints)
restarted = parallel.all_sum([float(checkpoints.is_of(out_dir, launch))], world_size, device)[0] > 0
if restarted: # torchrun has lost a process, and started all of them again
    init_from = 'resume'
elif init_from != 'resume' and not (eval_only or dry_run):
    checkpoints.check_new(out_dir, init_from, overwrite)

# -----------------------------------------------------------------------------
# memory

if init_from == 'resume':
    checkpoints.to_resume(out_dir) # first of all, since its options are this run's
folders = find_datasets(dataset)
tokenizer = read_shared_state(folders)
vocab_size = count_ids(tokenizer)
elsewhere = dry_run and memory_gb > 0 # the plan is for a card of so much, which need not be here
place = 'cuda' if elsewhere else device
free = parallel.least(memory_to_fill(device, memory_gb, elsewhere), world_size, device) # all choose the same
plans = memory.plans_for(config, place, world_size)

scratch = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)
model_config = checkpoints.config_of(init_from, out_dir, scratch)
check_length(block_size, model_config.block_size)
with torch.device('meta'): # without weights, which are not there yet
    model = GPT(model_config)
    lora.restrict(model, config)
half = dtype != 'float32' or elsewhere and config['dtype'] == 'auto'
shape = memory.shape_of(model, block_size, dropout, half, lora_rank > 0, optimizer == 'muon', world_size,
                        shard, place, init_from not in ('scratch', 'resume') and not freeze)
if dry_run: # which needs no data either
    epochs = epoch_times(out_dir, {**config, 'device': place, 'processes': world_size})
    say(tell_assumed(folders) * (init_from == 'scratch')
        + memory.table(shape, share, batch_size, free, epochs, plans, free_memory('cpu'), world_size))
    leave(0)

ram_free = math.inf if eval_only else free_memory('cpu') # before there is a model
plan, fits = memory.choose(plan, shape, share, batch_size, free, plans, ram_free, not eval_only)
micro_batch, n_micro_steps = memory.split_batch(share, fits)
if not eval_only or plan == 'offload':
    say(memory.describe(plan, shape, fits, fits < share, free))

# -----------------------------------------------------------------------------
# data

train_data = open_split(folders, 'train', block_size, vocab_size, seed=seed)
val_data = open_split(folders, 'val', block_size, vocab_size)
n_evaluated = eval_iters * batch_size or val_data.windows # windows of each split
read = f'{train_data.mark()} {val_data.mark()}, {min(n_evaluated, val_data.windows)} x {block_size} evaluated'
config['data'] = parallel.same_data(read, world_size, device, dataset)
for data in (train_data, val_data):
    list(data.evaluation_parts(n_evaluated)) # raises where a mask leaves none
if num_epochs:
    max_iters = min(max_iters, max(1, round(num_epochs * train_data.windows / sequences)))
    warmup_iters = min(warmup_iters, max_iters // 10)
lr_decay_iters = lr_decay_iters or max_iters

# -----------------------------------------------------------------------------
# model

loaded = {} # what a checkpoint holds beside the weights
if init_from == 'scratch':
    torch.manual_seed(seed)
    model = GPT(scratch)
elif init_from == 'resume':
    model, loaded = checkpoints.resume(out_dir, config, say)
else:
    model, loaded = checkpoints.load_model(init_from, dropout)
check_match(loaded.get('tokenizer'), model.config.vocab_size, tokenizer, dataset)
template = read_template(folders) or loaded.get('template')
if init_from != 'resume' and lora_rank: # a resumed run has its adapter, and knows its base
    loaded.update(checkpoints.describe_base(init_from, model))
base = {key: loaded.get(key) for key in ('base', 'base_fingerprint')}
lora.restrict(model, config)
if lora_rank:
    lora.shrink(model, DTYPES[dtype])

def with_room(work, *args, again=True):
    """ work(*args); where there is no room, again with smaller micro-batches, which change dropout alone """
    global micro_batch, n_micro_steps
    while True:
        try:
            return work(*args)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if micro_batch == 1 or world_size > 1 or not again: # the other processes do not know
            if saver.saved is not None and world_size == 1 and again: # of this run, which can be gone on with
                opt.zero_grad(set_to_none=True)
                save(tells=True)
            raise ValueError(memory.advice(plan, micro_batch, block_size, sequences,
                                           () if eval_only and again else plans, again,
                                           not shard and parallel.can_shard(world_size, config),
                                           saver.saved is not None or init_from == 'resume'))
        opt.zero_grad(set_to_none=True)
        was, (micro_batch, n_micro_steps) = micro_batch, memory.split_batch(share, micro_batch // 2)
        say(f"iter {iter_num}: out of memory with {was} sequences at a time; again with {micro_batch}")

model.follow(plan)
if shard:
    with_room(parallel.shard_model, model, world_size, device, again=False)
elif plan != 'offload':
    with_room(model.to, device, again=False)
raw_model = model # without DDP

# -----------------------------------------------------------------------------
# optimizer

opt = make_optimizer(optimizer, model, learning_rate, muon_learning_rate, weight_decay, (beta1, beta2),
                     offload_to=(device, DTYPES[dtype]) if plan == 'offload' else None)
updates_on = next(p.device for group in opt.param_groups for p in group['params'])
scaler = torch.amp.GradScaler(updates_on.type, enabled=dtype == 'float16')
iter_num, best, n_bad = 0, Best(), 0 # n_bad iterations in a row were not finite
if init_from == 'resume':
    iter_num, best, n_bad = loaded.get('iter_num', 0), Best.of(loaded), loaded.get('n_bad', 0)
    say(f"resuming at iteration {iter_num}{checkpoints.tell_changes(loaded.get('config', {}), config)}")
    if loaded.get('scaler') and scaler.is_enabled():
        scaler.load_state_dict(loaded['scaler'])
    config['init_from'] = loaded.get('config', {}).get('init_from', 'resume') # where it all began
parallel.check_same(iter_num, world_size, device, out_dir)

# -----------------------------------------------------------------------------
# compile and DDP

def one_step(model=raw_model):
    x, y = fetch(*train_data.batch(train_data.training_windows(0, micro_batch)), device)
    with autocast(device, dtype):
        model(x, y)[1].backward()

# each block for itself, so that backward gives its gradients away as it goes, and memory is as planned
is_compiled = with_room(compile_model, model.compiled_parts(), not eval_only and compile, device, one_step)
opt.zero_grad(set_to_none=True)
if world_size > 1 and not shard and not eval_only:
    model = with_room(parallel.replicate_model, raw_model, device, one_step)
if init_from == 'resume' and 'optimizer' in loaded and not eval_only:
    load_optimizer(opt, loaded['optimizer'])
loaded = None # the optimizer has what it needs of it

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate():
    """ the mean loss of each split, over evenly spread windows that the processes share; None if told to
    stop """
    losses = {}
    raw_model.eval()
    for name, data in (('train', train_data), ('val', val_data)):
        losses[name] = 0.0
        for weight, windows, n in data.evaluation_parts(n_evaluated):
            total = 0.0
            for batch in data.batches(windows, micro_batch * world_size):
                if parallel.all_sum(signals.asked(), world_size, device)[0]:
                    return None
                x, y = fetch(*data.batch(batch[rank::world_size]), device)
                with autocast(device, dtype):
                    total += raw_model(x, y, scale=1.0)[1].item()
            losses[name] += weight * parallel.all_sum([total], world_size, device)[0] / n
    raw_model.train()
    return losses

# -----------------------------------------------------------------------------
# logging

def save(is_best=False, tells=False):
    """ write last.pt, and let ckpt.pt be the same file where it is the best; tell whether that succeeded """
    state = checkpoints.adapter_state(raw_model, base) if lora_rank else {'model': weights(raw_model, opt)}
    moments = parallel.whole(opt.state_dict())
    done = master and saver({
        **state, 'optimizer': moments, 'model_args': checkpoints.model_args(raw_model), 'iter_num': iter_num,
        **vars(best), 'config': config, 'tokenizer': tokenizer, 'template': template,
        'scaler': scaler.state_dict(), 'n_bad': n_bad, 'launch': launch}, is_best, tells)
    done = parallel.all_sum([float(done)], world_size, device)[0] > 0
    saver.saved = iter_num if done else saver.saved # as each process may have to tell
    return done

def write_sample():
    """ add what the model writes now to samples.txt """
    raw_model.eval()
    torch.manual_seed(seed)
    with autocast(device, dtype, cache=not shard), torch.compiler.set_stance('force_eager'):
        made = raw_model.generate(prompt, sample_tokens, 0.8, top_k=200, n_vocab=vocab_size, fixed=False)
    raw_model.train()
    if master:
        append_sample(out_dir, iter_num, coder.decode(made[0].tolist()))

def log_evaluation():
    """ add to the log what was evaluated where its iteration is not made, or not logged """
    if master and row['iter'] == iter_num and 'val_loss' in row:
        append_row(out_dir, row, wandb_log)

if sample_interval:
    coder = from_state(tokenizer)
    prompt = torch.tensor([coder.encode(sample_start, allow_special=True) or [coder.eot or 0]], device=device)
n_trained = raw_model.num_params(trained=True)
say(f"{raw_model.num_params():,} parameters"
    f"{f', {n_trained:,} of them to train' if lora_rank or freeze else ''}, on "
    f"{f'{world_size} x ' if world_size > 1 else ''}{device} in {dtype}{', compiled' if is_compiled else ''}"
    f"{', sharded' if shard else ''}")
say(f"{train_data.n_tokens:,} tokens to train on, {val_data.n_tokens:,} to validate on")
say(f"an iteration is {sequences} sequences of {block_size} tokens, {sequences * block_size:,} tokens; "
    f"{max_iters:,} iterations are {train_data.describe_epochs(max_iters * sequences)}")
if eval_only:
    losses = with_room(evaluate)
    say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    leave(0)
if iter_num >= max_iters and init_from == 'resume' and is_logged(out_dir, iter_num):
    say(f"{out_dir} is trained to iteration {iter_num} already; type "
        f"--{'num_epochs' if max_iters < config['max_iters'] else 'max_iters'}=N with a larger N to go on")
    leave(0)
if master:
    saver.lock()
    wandb_id = start_wandb(config, init_from == 'resume')
    start_log(out_dir, config, dict(
        wandb_id=wandb_id, device=device, dtype=dtype, plan=plan, processes=world_size, max_iters=max_iters,
        warmup_iters=warmup_iters, lr_decay_iters=lr_decay_iters, machine=describe_machine(device),
        parameters=raw_model.num_params(), trained=n_trained, model_args=checkpoints.model_args(raw_model)),
        resume_at=iter_num if init_from == 'resume' else None)
    saver.clear(anew=overwrite and init_from != 'resume') # last, when nothing can refuse any more

# -----------------------------------------------------------------------------
# loop

def accumulate(windows, n_targets):
    """ make the gradients of an iteration, and return its loss, or this process's share of it; None if told
    to stop """
    # micro-batches add up to the mean over n_targets, and DDP divides by world_size
    scale = scaler.scale(torch.tensor(world_size / n_targets, device=updates_on)).to(device)
    loss = torch.zeros((), device=device)
    mine = windows.reshape(world_size, n_micro_steps, micro_batch, 2)[rank]
    for micro_step in range(n_micro_steps):
        if signals.end and world_size == 1: # several would have to agree
            return None
        x, y = fetch(*train_data.batch(mine[micro_step]), device)
        if raw_model.draws: # seeded by the number of its first sequence, so that a resumed run draws the same
            step = (iter_num * world_size + rank) * n_micro_steps + micro_step
            torch.manual_seed(seed + step * micro_batch)
        if model is not raw_model: # the processes exchange gradients once, in the last backward
            model.require_backward_grad_sync = micro_step == n_micro_steps - 1
        with autocast(device, dtype):
            _, micro_loss = model(x, y, scale=scale)
        micro_loss.backward()
        loss += micro_loss.detach() / (scale * n_targets)
        if plan == 'offload':
            opt.collect() # or the next loss would find the last gradients there still
    return loss

signals.listen()
clock = Clock(sequences * block_size, raw_model.flops_per_token(block_size) * sequences * block_size,
              (peak_flops(device, dtype) or 0) * world_size, max_iters)
ended = False # whether this was the last evaluation
while True:
    # once in a while: evaluate and save
    row = {'iter': iter_num, 'epoch': round(iter_num * sequences / train_data.windows, 4)}
    if iter_num % eval_interval == 0 or iter_num >= max_iters:
        losses, before = with_room(evaluate), best
        if losses is None:
            break
        row.update(train_loss=losses['train'], val_loss=losses['val'])
        best, is_best = best.after(iter_num, losses['val'])
        say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
            f"{', the best so far' if is_best else ''}")
        ended = iter_num >= max_iters or 0 < patience <= best.n_worse
        if is_best or always_save_checkpoint or keep_checkpoints or ended:
            best = best if save(is_best) else best.without(before)
    if sample_interval and iter_num % sample_interval == 0 and (master or shard):
        write_sample()
    if ended:
        break

    # one step: accumulate, clip, update
    t0 = time.time()
    lr = get_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr else learning_rate
    set_lr(opt, lr / (learning_rate or 1))
    windows = train_data.training_windows(iter_num, sequences)
    n_targets = max(1, train_data.count(windows)) # 0 where a mask leaves none
    loss = with_room(accumulate, windows, n_targets)
    if loss is None:
        break
    scaler.unscale_(opt)
    grad_norm = clip_gradients(opt, grad_clip or math.inf).item()
    loss, n_ending, n_saving = parallel.all_sum([loss.item(), *signals.asked()], world_size, device)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    overflow = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1 # float16's own
    n_bad = 0 if finite or overflow else n_bad + 1
    if finite:
        with_room(scaler.step, opt, again=False) # AdamW makes its moments in the first
    if finite or scaler.is_enabled(): # which scales less after what is not
        scaler.update()
    if not finite:
        say(f"iter {iter_num}: loss {loss}, gradient norm {grad_norm}; no update")
    if n_bad >= 5:
        n_bad = 0 # a resumed run may have five again
        save(tells=True)
        log_evaluation()
        raise ValueError(f"five iterations in a row were not finite, up to {iter_num}; "
                         f"{checkpoints.way_back(out_dir)} with a lower --learning_rate, or --dtype=float32")
    opt.zero_grad(set_to_none=model is raw_model) # zeros stay in DDP's buckets
    dt = time.time() - t0

    # report: everything below is only bookkeeping
    if iter_num % log_interval == 0 or 'val_loss' in row:
        speed, text = clock.lap(iter_num, row['epoch'], dt)
        row.update(speed, loss=loss, lr=lr, grad_norm=grad_norm, memory_mb=round(memory_mb(device), 1))
        if master:
            append_row(out_dir, row, wandb_log)
        say(f"iter {iter_num}: loss {loss:.4f}, {text}")
    iter_num += 1
    if n_ending:
        break
    if n_saving:
        signals.save = False
        save(tells=True)

# -----------------------------------------------------------------------------
# finish

log_evaluation()
if not ended:
    opt.zero_grad(set_to_none=True) # of an iteration that is begun again after a resume
    save(tells=True)
say(f"{'finished' if ended else 'stopped'} at iteration {iter_num} after {clock.passed()}")
if master:
    finish_log(wandb_log)
    saver.check()
say(best.describe(out_dir, iter_num, patience * (iter_num < max_iters), ended, asked=template is not None))
leave(signals.status())
