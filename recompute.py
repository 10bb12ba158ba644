"""
What of a forward pass is kept for backward, and what backward computes again: memory.py's plans in the model.

In every plan, Linear keeps no half-precision copy of its weight. In the leaner ones a block runs twice, the
second time when backward comes to it: in selective from what is_kept has kept, in recompute and offload from
its input alone. torch's checkpoint makes this second pass, and stops it at the last tensor that backward
needs; SecondPass, the context that it runs in, lets it stop earlier still. In these plans memory is
short, so on a CPU with glibc the gaps between tensors go back to the system (close_gaps).

Shapes: x and a block's result are (B, T, C), C = n_embd.
"""
import ctypes
import sys
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attention # registers fitgpt::dropped_attention

# -----------------------------------------------------------------------------
# in every plan

class HalfLinear(torch.autograd.Function):
    """ a linear layer on half-precision x (..., n_in), with weight (n_out, n_in) and bias rounded alike;
    given `stand_in`, of the result's shape, it returns that, and only what it saves for backward matters """

    @staticmethod
    def forward(ctx, x, weight, bias, stand_in):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if stand_in is not None:
            return stand_in.detach() # detach is the op that a selective checkpoint lets a second pass add
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        dx = grad @ weight.to(grad.dtype) if needs_dx else None
        dw = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if needs_dw else None
        return dx, dw, rows.sum(0).float() if needs_db else None, None

class Linear(nn.Linear):
    """ a Linear that, under autocast, keeps no half-precision copy of its weight for backward, but rounds it
    again there """

    stand_in = None # set by SecondPass when nothing needs the result

    def forward(self, x):
        device = x.device.type
        learns = torch.is_grad_enabled() and torch.is_autocast_enabled(device)
        if not learns or torch.compiler.is_compiling(): # is_cast does the same in compiled code
            return super().forward(x)
        return HalfLinear.apply(x.to(torch.get_autocast_dtype(device)), self.weight, self.bias,
                                self.stand_in)

# -----------------------------------------------------------------------------
# a block that runs twice

# glibc's; musl, macOS and Windows have none
MALLOC_TRIM = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None

def close_gaps(x) -> None:
    """ if x is on a CPU with glibc, return the free memory between tensors to the system; the allocator would
    keep it, though few of the gradients that follow fit in, which are larger than activations """
    if MALLOC_TRIM and x.device.type == 'cpu':
        MALLOC_TRIM(0)

def run_again(block, x):
    """ block(x), of which only x is kept """
    return checkpoint(block, x, use_reentrant=False, context_fn=partial(two_passes, block, x))

def run_partly_again(block, x):
    """ block.layers(x), of which a selective block keeps what is_kept says; in compiled code, any other block
    keeps all but what is_cast says """
    compiles = torch.compiler.is_compiling()
    # compiled code gives each random draw its own seed, so one can be left out
    keep = partial(is_kept, block.attn.dropout > 0 and not compiles) if block.selective else is_cast
    contexts = partial(create_selective_checkpoint_contexts, keep)
    if not compiles:
        contexts = partial(two_passes, block, x, contexts)
    return checkpoint(block.layers, x, use_reentrant=False, context_fn=contexts)

def two_passes(block, x, contexts=lambda: (nullcontext(), nullcontext())):
    """ checkpoint's two contexts: of the forward pass over x, and of its SecondPass for backward """
    first, second = contexts()
    return first, SecondPass(block.mlp.c_proj, x, second)

ATTENTION = [getattr(torch.ops.aten, f'_scaled_dot_product_{kind}').default for kind in (
    'flash_attention', 'efficient_attention', 'cudnn_attention', 'flash_attention_for_cpu')]
DROPPED_ATTENTION = torch.ops.fitgpt.dropped_attention.default
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
LINEAR = torch.ops.aten.linear.default # the op of a product on MPS

def is_kept(draws, ctx, op, *args, **options):
    """ whether a selective block keeps the result of `op`: of attention and of products with its own matrices
    (C to 3 C, C to C, C to 4 C), not with LoRA's (C to a rank below C / 4, and back); of mlp.c_proj's (4 C to
    C) only in float32 with dropout after it, since otherwise the second pass stops before it

    `draws`: whether there is dropout. torch's attention then runs again: skipping it would also skip its
    random draws and change all later ones. dropped_attention draws its seed beforehand, so it can be kept.
    torch passes all arguments but `draws`.
    """
    keep = op == DROPPED_ATTENTION or op in ATTENTION and not draws
    if op in PRODUCTS or op == LINEAR:
        n_in, n_out = args[1].shape[::-1] if op == LINEAR else args[-1].shape
        keep = n_out // 4 <= n_in <= n_out * (4 if draws and args[0].dtype == torch.float32 else 1)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

def is_cast(ctx, op, *args, **options):
    """ whether backward of a compiled block recomputes the result of `op`: always a weight's half-precision
    copy, as in Linear; the compiler decides about the rest """
    again = op == torch.ops.aten._to_copy.default and args[0].dim() == 2
    return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE

NO_RNG_RESTORED_ON = 'mps' # the device whose random state torch's checkpoint does not restore

class SecondPass:
    """ the context in which a block runs over x again for backward; under autocast without its last product

    torch stops this run at the last tensor that backward needs, but a HalfLinear saves its tensors only when
    it returns, so the last one returns a stand-in instead of its product. The stand-in is uninitialized: of
    what follows it, only dropout's mask matters, which does not depend on its values.
    """

    def __init__(self, last, x, context):
        self.last, self.x, self.context = last, x, context
        self.rng = torch.mps.get_rng_state() if x.device.type == NO_RNG_RESTORED_ON else None

    def __enter__(self):
        device = self.x.device.type
        close_gaps(self.x)
        if self.rng is not None:
            self.later = torch.mps.get_rng_state()
            torch.mps.set_rng_state(self.rng)
        if torch.is_autocast_enabled(device):
            self.last.stand_in = torch.empty_like(self.x, dtype=torch.get_autocast_dtype(device))
        self.context.__enter__()

    def __exit__(self, *error):
        self.last.stand_in = None
        if self.rng is not None:
            torch.mps.set_rng_state(self.later)
        return self.context.__exit__(*error)
