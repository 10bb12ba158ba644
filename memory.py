"""
How much memory a run will take on its device, computed before it starts, and the plan that fits.

The plans, the one that recomputes least first:
  device     weights, gradients, moments and activations, all on the device
  selective  a block keeps attention and the products that backward needs; the rest, which is cheap, is
             recomputed
  recompute  only the input of each block is kept, and backward runs the block again: a third more products,
             or a fifth if it is not compiled (with frozen matrices, up to half more)
  offload    as recompute, but the device holds the matrices, except the positions, in the products' dtype;
             the float32 weights, the gradients and AdamW's moments are in RAM, where the CPU updates them
Every plan keeps S, the number of sequences in an iteration, and computes the same.

This is arithmetic on shapes; nothing is allocated. Sizes are in bytes if no unit is named; B: micro-batch.
"""
import math
from dataclasses import dataclass, replace

from lora import TARGETS
from loss import rows_at_once

GiB = 2**30
RAM_SPARE = GiB // 2 # of the RAM that is free, for Python and for what `ram` does not count
ADAPTER = '--lora_rank=16 --learning_rate=3e-4' # an adapter takes a higher one than all weights do
PLANS = 'device', 'selective', 'recompute', 'offload'

@dataclass
class Shape:
    """ everything about a run that its memory depends on """
    params: int # the tied matrix counted once
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int # length of the sequences, not the model's positions
    dropout: float = 0.0
    half: bool = True # matrix products in bfloat16 or float16
    frozen: int = 0 # how many of params are not trained
    lora: bool = False # frozen matrices are in the products' dtype, with LoRA's beside them
    head: bool = True # the tied matrix is trained
    muon: int | None = None # elements that have one moment, Muon's, not AdamW's two; None without Muon
    shards: int = 1 # number of processes that share weights, gradients and moments
    buckets: int = 0 # number of processes if gradients lie in DDP's buckets, which stay allocated; else 0
    adapts: bool = False # LoRA could be used instead
    idle: int = 0 # first blocks that backward never reaches
    device: str = 'cuda' # or cpu or mps, whose attention keeps more
    inputs: float = 6.0 # from inputs_of: the inputs of trained matrices; 6 if a block's are all trained
    dropped: float = 0.0 # from inputs_of: those that LoRA's dropout is applied to

def shape_of(model, block_size: int, dropout: float, half: bool, lora: bool = False,
             muon: bool = False, processes: int = 1, shard: bool = False, device: str = 'cuda',
             adapts: bool = False) -> Shape:
    """ the Shape of a run of `model`, a GPT anywhere, on `device`; trained parameters require gradients """
    c, n_params = model.config, model.num_params()
    single = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad)
    idle = model.n_idle()
    return Shape(n_params, c.n_layer, c.n_head, c.n_embd, c.vocab_size, block_size, dropout, half,
                 n_params - model.num_params(trained=True), lora, model.lm_head.weight.requires_grad,
                 single if muon else None, processes if shard else 1,
                 processes if processes > 1 and not shard else 0, adapts and not lora, idle,
                 device.split(':')[0], *inputs_of(model.transformer.h[idle:], c.n_embd))

def inputs_of(blocks, n_embd: int) -> tuple[float, float]:
    """ the inputs of a block's matrices that backward needs, and those that LoRA's dropout is applied to:
    means over these blocks, in units of n_embd channels per token """
    kept = dropped = 0.0
    for block in blocks:
        for name in TARGETS:
            linear = block.get_submodule(name)
            channels = linear.in_features / n_embd
            if name != 'attn.c_proj' and any(p.requires_grad and p.dim() == 2 for p in linear.parameters()):
                kept += channels # attn.c_proj's is attention's output, kept anyway
            if hasattr(linear, 'lora_A'):
                kept += linear.lora_A.size(0) / n_embd # the input of lora_B
                dropped += channels * (linear.lora_dropout > 0)
    return kept / max(1, len(blocks)), dropped / max(1, len(blocks))

def peak(plan: str, shape: Shape, B: int, accumulates: bool = True) -> int:
    """ peak bytes on the device in an iteration with micro-batches of B sequences

    accumulates: whether gradients of earlier micro-batches are there, too. The peak is at the loss, at the
    last block, where backward begins, or at the first, by when all gradients are made.
    """
    s, tokens = shape, B * shape.block_size
    width, E = tokens * s.n_embd, s.vocab_size * s.n_embd
    matrices, item = 12 * s.n_embd**2, 2 if s.half else 4 # matrices: elements of those of a block

    # state: weights and moments, at all times; made: all gradients; gathered: those there from the start
    if plan == 'offload': # a gradient leaves as soon as it is made
        state, gathered, made = 4 * s.params - (4 - item) * (matrices * s.n_layer + E), 0, 0
    else:
        made = 4 * (s.params - s.frozen)
        state = 3 * made + (item if s.lora else 4) * s.frozen - 4 * (s.muon or 0)
        gathered = made if accumulates or s.buckets else 0
    if s.shards > 1: # plus what is put together: the embeddings and two blocks
        state, gathered, made = (size // s.shards for size in (state, gathered, made))
        state += 4 * (s.params - matrices * s.n_layer) + 2 * 4 * matrices

    # until backward comes to a block: what it keeps
    block, products = block_keeps(s, B)
    n_blocks = s.n_layer - s.idle
    if plan == 'device':
        kept, again = n_blocks * block + 8 * width, 0
    else:
        products = products if plan == 'selective' else 0
        kept = n_blocks * (4 * width + products) + (12 if n_blocks else 8) * width
        again = block - products if n_blocks else 0 # what the block recomputes

    head = 4 * E * s.head # the head's gradient, which waits for the embedding's
    casts = 2 if s.half and not s.lora and plan != 'offload' else 0 # bytes of an element's copy in half
    loss = head + casts * E + chunk(s, tokens)

    work = width * (6 if s.half else 14) # temporaries of a block's backward
    # the gradients of its matrices, and of those that may be on their way: of two blocks, with shards of one
    grads = 3 * item if plan == 'offload' else 4 * (not s.lora) + 4 * (s.shards > 1)
    last = head + (casts + grads) * matrices + again + work

    # all gradients but this block's own; beside accumulated ones, the head's new one, not yet added to them
    first = made - gathered + max(0, block + work - 4 * matrices)
    first += head if s.shards > 1 or made == gathered else 0
    return state + gathered + max(kept + loss, kept + last, first)

def block_keeps(s: Shape, B: int) -> tuple[int, int]:
    """ the bytes that a block keeps for backward, and those of its products and attention, which a selective
    block keeps beside its input

    Of each token, in units of n_embd: queries, keys and values (3), attention's result (1), c_fc's (4) and
    the inputs of trained matrices (6), in the products' dtype; the inputs of both norms (2), in float32.
    """
    tokens, item = B * s.block_size, 2 if s.half else 4
    width, normalizers = tokens * s.n_embd, 4 * tokens * s.n_head
    on_cpu = s.device == 'cpu'
    # dropout's masks are of a byte, or on a CPU as wide as their tensors
    masks = 0 if not s.dropout else 2 * item if on_cpu else 2
    block = int(width * (8 * item + 2 * 4 + item * s.inputs + masks)) + normalizers
    block += int(width * s.dropped * (1.5 if not on_cpu else 3 if s.half else 4.5)) # LoRA's dropout, by count
    products = 9 * item * width + normalizers * (s.dropout == 0) # with attention's c_proj (1)
    if on_cpu and s.dropout and not s.half: # then mlp.c_proj's is kept, too; on CUDA in place of attention
        products += 4 * width
    if s.device == 'mps': # it has no kernel that avoids T x T scores, 12.5 bytes each by count
        block += int(12.5 * B * s.n_head * s.block_size**2)
    return block, products

def chunk(s: Shape, tokens: int) -> int:
    """ what the chunked loss holds: the current rows' logits and, in half precision, the softmax of some of
    them and a part of the head's gradient; and the gradient of its input """
    rows, few = rows_at_once(tokens, s.vocab_size, 2 if s.half else 4)
    product = min(s.vocab_size * s.n_embd, few * s.vocab_size if s.device == 'cpu' else 2**13 * s.n_embd)
    held = (2 * rows + 4 * few) * s.vocab_size + 2 * product if s.half else 4 * rows * s.vocab_size
    return held + tokens * s.n_embd * 4

def ram(plan: str, shape: Shape) -> int:
    """ the bytes of RAM that a plan fills with tensors, if the device is not the CPU itself """
    if plan != 'offload':
        return 0
    # the largest matrix's gradient and it itself cross the bus in pinned memory, in powers of two
    pinned = sum(2**math.ceil(math.log2(item * shape.vocab_size * shape.n_embd))
                 for item in (4, 2 if shape.half else 4))
    return 16 * shape.params + pinned # weights, gradients and two moments

def plans_for(config: dict, device: str, processes: int = 1) -> tuple[str, ...]:
    """ the plans that a run with these options may take; raises ValueError if `plan` names another """
    wanted = config['plan']
    cannot = config['optimizer'] != 'adamw' or config['lora_rank'] or config['freeze'] or processes > 1
    # on a CPU offloading gains nothing, and is there only to be tried; MPS shares the RAM, too, and may crash
    # when offload's thread copies while another computes
    cannot = cannot or device == 'mps' or device == 'cpu' and wanted != 'offload'
    plans = PLANS[:3] if cannot else PLANS
    if wanted != 'auto' and wanted not in plans:
        why = (f"plan {wanted!r} is for one process and adamw, nothing frozen, no LoRA, no MPS"
               if wanted in PLANS else f"there is no plan {wanted!r}")
        raise ValueError(f"{why}; type --plan=NAME with one of: "
                         f"auto, {', '.join(plans if wanted in PLANS else PLANS)}")
    return plans

def split_batch(sequences: int, most: int) -> tuple[int, int]:
    """ the largest micro-batch, of at most `most`, that divides `sequences` evenly, and how many of them
    there are: (480, 25) -> (24, 20) """
    batch_size = max(n for n in range(1, most + 1) if sequences % n == 0)
    return batch_size, sequences // batch_size

def largest(plan: str, shape: Shape, sequences: int, most: int, budget: float) -> int:
    """ the largest micro-batch, of at most `most`, that divides `sequences` and fits; 0 if none does """
    fitting = (B for B in range(min(most, sequences), 0, -1) if sequences % B == 0
               and peak(plan, shape, B, accumulates=B < sequences) <= budget)
    return next(fitting, 0)

def choose(wanted: str, shape: Shape, sequences: int, most: int, budget: float,
           plans: tuple[str, ...] = PLANS, ram_free: float = math.inf,
           learns: bool = True) -> tuple[str, int]:
    """ the first of `plans` that fits, and its micro-batch; raises ValueError if none fits

    A plan `wanted` by name is taken even if it is not expected to fit, then with a micro-batch of 1.
    """
    if not learns and wanted != 'offload' and (4 * shape.params < budget or 'offload' not in plans):
        return 'device', min(most, sequences) # an evaluation takes the weights, and little more
    if wanted != 'auto':
        return wanted, largest(wanted, shape, sequences, most, budget) or 1
    for plan in plans:
        B, needed = largest(plan, shape, sequences, most, budget), ram(plan, shape)
        if B and needed and needed + RAM_SPARE > ram_free:
            raise ValueError(f"plan {plan} needs {(needed + RAM_SPARE) / GiB:.1f} GiB of RAM, and "
                             f"{ram_free / GiB:.1f} are free; "
                             f"{tell_leaner(PLANS[2], shape, budget)}take a smaller model, or, with swap for "
                             f"it, type --plan={plan}")
        if B:
            return plan, B
    leanest = plans[-1]
    raise ValueError(f"no plan fits: {leanest}, the leanest here, takes {peak(leanest, shape, 1) / GiB:.1f} "
                     f"GiB with one sequence of {shape.block_size} tokens at a time, and "
                     f"{max(budget, 0) / GiB:.1f} GiB are free to fill; {tell_leaner(leanest, shape, budget)}"
                     f"take a smaller model, or type --plan={leanest} to try all the same")

def leaner_runs(plan: str, shape: Shape, budget: float):
    """ options that would make a run fit which does not, the one that changes least first """
    shared = replace(shape, shards=shape.buckets, buckets=0)
    by_adamw = not shape.lora and shape.muon is None
    if shape.buckets and by_adamw and peak('recompute', shared, 1) <= budget:
        yield '--shard=True'
    lengths = (shape.block_size >> n for n in range(1, 6))
    fitting = (n for n in lengths if n and peak(plan, replace(shape, block_size=n), 1) <= budget)
    if length := next(fitting, 0):
        yield f'--block_size={length}'
    if shape.adapts and peak('recompute', with_lora(shape, 16), 1) <= budget:
        yield (ADAPTER + (' --optimizer=adamw' if shape.muon is not None else '')
               + (' --shard=False' if shape.shards > 1 else ''))

def tell_leaner(plan: str, shape: Shape, budget: float) -> str:
    return ''.join(f'type {run}, ' for run in leaner_runs(plan, shape, budget))

def with_lora(s: Shape, rank: int) -> Shape:
    """ the Shape of the same run with LoRA: two matrices beside each of a block's four """
    adapter = 16 * rank * s.n_embd * s.n_layer
    return replace(s, params=s.params + adapter, frozen=s.params, lora=True, head=False, muon=None, idle=0,
                   adapts=False, inputs=6 + 4 * rank / s.n_embd, shards=1,
                   buckets=s.shards if s.shards > 1 else s.buckets)

# -----------------------------------------------------------------------------
# in words

def advice(plan: str, B: int, config: dict, plans: tuple[str, ...] = PLANS, works: bool = True,
           shards: bool = False, saved: bool = False) -> str:
    """ the error for a plan that ran out of memory all the same; its advice keeps how many sequences an
    iteration has, and an evaluation no fewer

    works: whether sequences were being processed; if not, weights, gradients and moments alone were too much,
    and only offload or shards, where the run can use them, hold less. saved: the run can be resumed.
    """
    resumed = 'type --init_from=resume ' if saved else 'type '
    leaner = [name for name in PLANS[PLANS.index(plan) + 1:] if name in plans]
    if not works:
        less = ('--plan=offload' if 'offload' in leaner else '--shard=True' if shards
                else f"{ADAPTER}{' --out_dir=ANOTHER' if saved else ''}, or take a smaller model")
        return (f"out of memory in plan {plan}, with weights, gradients and moments alone; "
                f"{'type ' if 'lora' in less else resumed}{less}")
    batch_size, block_size = config['batch_size'], config['block_size']
    smaller, n_steps = split_batch(batch_size * config['gradient_accumulation_steps'], max(1, B // 2))
    evaluated = math.ceil(config['eval_iters'] * batch_size / smaller)
    evaluated = f' --eval_iters={evaluated}' if evaluated else ''
    option = (f"--batch_size={smaller} --gradient_accumulation_steps={n_steps}{evaluated}" if B > 1
              else f"--plan={leaner[0]}" if leaner else '--shard=True' if shards
              else f"--block_size={max(1, block_size // 2)}")
    return f"out of memory in plan {plan}, {count(B)} of {block_size} tokens at a time; {resumed}{option}"

def count(sequences: int) -> str:
    return f"{sequences} sequence{'s' if sequences > 1 else ''}"

COSTS = {'device': 'recomputes nothing', 'selective': 'recomputes cheap operations',
         'recompute': '{} more matrix products',
         'offload': '{} more matrix products, weights and gradients cross the bus'}

def cost(plan: str, shape: Shape) -> str:
    """ what a plan costs in speed, in words """
    return COSTS[plan].format('up to half' if shape.frozen else 'a fifth to a third')

def describe(plan: str, shape: Shape, B: int, accumulates: bool, budget: float,
             ram_free: float = math.inf) -> str:
    """ a run's plan in words: what memory it takes, and what is kept where """
    kept = 'all activations' if plan == 'device' else "of activations each block's input"
    kept += ' and products' if plan == 'selective' else ''
    beside, there = '', f"weights, gradients, moments; {kept}"
    if shape.shards > 1:
        there = f"a share of {there}"
    if plan == 'offload':
        beside = f"; in RAM {ram(plan, shape) / GiB:.1f} expected"
        beside += f", {ram_free / GiB:.1f} free" if ram_free < math.inf else ''
        there = (f"matrices{' in half precision' if shape.half else ''}; {kept}; "
                 "in RAM: weights, gradients, moments in float32")
    return (f"plan {plan}, {count(B)} at a time: {peak(plan, shape, B, accumulates) / GiB:.2f} GiB "
            f"expected, {max(budget, 0) / GiB:.1f} free to fill{beside}; {cost(plan, shape)}\n"
            f"on {shape.device}: {there}")

def table(shape: Shape, sequences: int, most: int, budget: float, epochs: dict[str, float],
          plans: tuple[str, ...] = PLANS, ram_free: float = math.inf, processes: int = 1) -> str:
    """ a table of every plan's memory, micro-batch, cost and, where known, seconds per epoch, for one of the
    processes, whose share of an iteration is `sequences` """
    beside = f', {sequences} by each of {processes} processes' if processes > 1 else ''
    wide = 9 if epochs else 0
    lines = [f"{count(sequences * processes)} of {shape.block_size} tokens an iteration{beside}; "
             f"{max(budget, 0) / GiB:.1f} GiB to fill",
             f"{'plan':<11}{'micro-batch':>12}{'GiB on device':>15}{'GiB in RAM':>12}"
             f"{'epoch' if epochs else '':>{wide}}  fits  costs"]
    for plan in PLANS:
        B = largest(plan, shape, sequences, most, budget)
        used = peak(plan, shape, B or 1, accumulates=(B or 1) < sequences) / GiB
        took = f"{epochs[plan]:,.0f} s" if plan in epochs else 'unknown' if epochs else ''
        fits = 'yes' if B and plan in plans else 'no'
        why = (cost(plan, shape) if plan in plans else 'gains nothing on a CPU' if shape.device == 'cpu'
               else 'is for one process and adamw, nothing frozen')
        if B and plan in plans and ram(plan, shape) and ram(plan, shape) + RAM_SPARE > ram_free:
            why += '; more RAM than is free here'
        lines.append(f"{plan:<11}{B or 1:>12}{used:>15.2f}{ram(plan, shape) / GiB:>12.1f}{took:>{wide}}  "
                     f"{fits:<4}  {why}")
    try:
        plan, B = choose('auto', shape, sequences, most, budget, plans)
        needs = f", and needs {(ram(plan, shape) + RAM_SPARE) / GiB:.1f} GiB of free RAM"
        lines.append(f"--plan=auto takes {plan}, {count(B)} at a time{needs if ram(plan, shape) else ''}")
    except ValueError as error: # none fits
        lines.append(str(error))
    return '\n'.join(lines)
