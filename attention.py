"""
Causal attention, computed on each device in the way that takes the least time and memory.

Shapes: q, k, v and the result are (B, n_head, T, head_size), for B sequences of T tokens.
"""
import math

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# cuDNN's attention would prepare anew for each length of a cache
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

def attend(q, k, v, dropout: float, mask=None):
    """ causal attention; a single query (T = 1) sees all of k and v that `mask`, if given, does not hide;
    dropout is a probability, which on a CPU is rounded to a multiple of 2**-16 """
    on_cpu = q.device.type == 'cpu' and q.size(2) == k.size(2) # not one token after a cache
    if on_cpu and dropout:
        n_dropped = min(round(dropout * 2**16), 2**16 - 1)
        return dropped_attention(q, k, v, n_dropped, torch.randint(2**62, ()))
    if on_cpu and q.requires_grad and q.dtype != torch.float32:
        return HalfAttention.apply(q, k, v)
    if q.is_cuda and q.size(2) < k.size(2):
        with sdpa_kernel(ANY_LENGTH):
            return F.scaled_dot_product_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=q.size(2) > 1)

class HalfAttention(torch.autograd.Function):
    """ causal attention on a CPU in half precision, with backward in float32: torch's backward in half
    precision is slower and no more exact """

    @staticmethod
    def forward(ctx, q, k, v):
        y, logsumexp = FLASH_CPU(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    def backward(ctx, dy):
        *halves, logsumexp = ctx.saved_tensors
        q, k, v, y = (tensor.float() for tensor in halves)
        grads = FLASH_CPU_BACKWARD(dy.float(), q, k, v, y, logsumexp, 0.0, True)
        return tuple(grad.to(dy.dtype) for grad in grads)

# -----------------------------------------------------------------------------
# attention with dropout, for which torch has no CPU kernel that avoids keeping all T x T scores

SCORES = 2**20 # computed at a time, few enough to fit the cache

def few_sequences(*tensors):
    """ yield a few sequences at a time: the slice of them, and each tensor's part in float32, with all their
    heads side by side, (heads, T, head_size) """
    B, n_head, T, _ = tensors[0].shape
    n = max(1, SCORES // (n_head * T * T))
    for start in range(0, B, n):
        some = slice(start, start + n)
        yield some, [tensor[some].float().flatten(0, 1) for tensor in tensors]

def few_rows(q, k, n_dropped: int, generator):
    """ yield a few rows of the scores at a time: the slice of them, their probabilities (heads, rows, tokens
    seen), and for each of these 1 if dropout keeps it, else 0 """
    heads, T, head_size = q.shape
    n = max(1, SCORES // (heads * T))
    for start in range(0, T, n):
        stop = min(start + n, T)
        later = torch.full((stop - start, stop), -math.inf).triu_(start + 1) # else 0
        scores = torch.baddbmm(later, q[:, start:stop], k[:, :stop].mT, alpha=head_size**-0.5)
        probs = scores.softmax(-1)
        yield slice(start, stop), probs, draw(probs.shape, generator).ge_(n_dropped - 2**15)

def draw(shape, generator):
    """ uniform random int16 of the full range; drawn four at once, much faster than with bernoulli_ """
    n = math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None, generator=generator)
    return bits.view(torch.int16)[:n].view(shape)

@torch.library.custom_op('fitgpt::dropped_attention', mutates_args=())
def dropped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_dropped: int,
                      seed: torch.Tensor) -> torch.Tensor:
    """ causal attention; dropout, seeded by `seed` (), drops n_dropped / 2**16 of the probabilities """
    y, n_head, kept_share = torch.empty_like(q), q.size(1), 1 - n_dropped / 2**16
    generator = torch.Generator().manual_seed(seed.item())
    with torch.autocast('cpu', enabled=False):
        for some, (q, k, v) in few_sequences(q, k, v):
            for rows, probs, kept in few_rows(q, k, n_dropped, generator):
                part = torch.bmm(probs.mul_(kept), v[:, :rows.stop]).div_(kept_share)
                y[some, :, rows] = part.unflatten(0, (-1, n_head))
    return y

@torch.library.custom_op('fitgpt::dropped_attention_backward', mutates_args=())
def dropped_attention_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                               dy: torch.Tensor, n_dropped: int,
                               seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ the gradients of q, k and v, as in FlashAttention's appendix B, https://arxiv.org/abs/2205.14135 """
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    n_head, kept_share, scale = q.size(1), 1 - n_dropped / 2**16, q.size(3)**-0.5
    generator = torch.Generator().manual_seed(seed.item())
    with torch.autocast('cpu', enabled=False):
        for some, (q, k, v, y, dy) in few_sequences(q, k, v, y, dy):
            dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, k, v))
            for rows, probs, kept in few_rows(q, k, n_dropped, generator):
                n, d = rows.stop, dy[:, rows] / kept_share
                dscores = torch.bmm(d, v[:, :n].mT).mul_(kept) # gradient of the probabilities
                dscores.sub_((dy[:, rows] * y[:, rows]).sum(-1, keepdim=True)).mul_(probs) # now of the scores
                dv[:, :n].baddbmm_(probs.mul_(kept).mT, d)
                dk[:, :n].baddbmm_(dscores.mT, q[:, rows], alpha=scale)
                dq[:, rows] = torch.bmm(dscores, k[:, :n]).mul_(scale)
            for grad, part in zip(grads, (dq, dk, dv)):
                grad[some] = part.unflatten(0, (-1, n_head))
    return tuple(grads)

@dropped_attention.register_fake
def _(q, k, v, n_dropped, seed):
    return torch.empty_like(q)

@dropped_attention_backward.register_fake
def _(q, k, v, y, dy, n_dropped, seed):
    return tuple(torch.empty_like(tensor) for tensor in (q, k, v))

def save_for_backward(ctx, inputs, output):
    *tensors, ctx.n_dropped, seed = inputs
    ctx.save_for_backward(*tensors, output, seed)

def backward(ctx, dy):
    *tensors, seed = ctx.saved_tensors
    return *dropped_attention_backward(*tensors, dy, ctx.n_dropped, seed), None, None

dropped_attention.register_autograd(backward, setup_context=save_for_backward)
