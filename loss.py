"""
The loss of a model's last hidden states, and its gradients, without the logits of all tokens at once.

Shapes: N tokens of C = n_embd channels, V the vocabulary.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

def rows_at_once(N: int, V: int, itemsize: int) -> tuple[int, int]:
    """ how many rows of logits, with elements of itemsize bytes, to compute at once: of a product, where many
    are faster, and, in equal parts, of a softmax that is not compiled, where few fit in a CPU's cache:
    (1024, 50257, 2) -> (256, 64) """
    rows = min(N, max(N // (2 * itemsize), 2**22 // V, 1))
    few = min(rows, max(rows // 8, 2**22 // V, 1))
    return rows, math.ceil(rows / math.ceil(rows / few))

def mean_row(weight):
    """ the mean (C,) of weight's rows (V, C), some at a time, or a CPU would copy all to float32 """
    sums = [rows.sum(0, dtype=torch.float32) for rows in weight.split(2**12)]
    return (sum(sums) / len(weight)).to(weight.dtype)

MIXED_ADD_COPIES_ON = 'cpu' # the device where adding tensors of two dtypes makes a temporary copy of one

def add_product(total, a, b, room) -> None:
    """ total (V, C), in float32, += a (V, N) @ b (N, C); in half precision a few rows of total at a time,
    since the whole product would be as large as a copy of the head

    room: float32 scratch memory in place of a CPU's temporary copies, which, made this often, leave gaps in
    its memory; None if a and b are in float32.
    """
    if room is None:
        total.addmm_(a, b)
        return
    copies, (V, C) = total.device.type == MIXED_ADD_COPIES_ON, total.shape
    n_rows = min(V, room.numel() // C if copies else 2**13)
    buffer = torch.empty(n_rows, C, dtype=b.dtype, device=b.device)
    for part, rows in zip(total.split(n_rows), a.split(n_rows)):
        product = torch.mm(rows, b, out=buffer[:len(rows)])
        part += room.view(-1)[:product.numel()].view_as(product).copy_(product) if copies else product

class CrossEntropy(nn.Module):
    """ the summed cross-entropy of the first V columns of logits (N, >= V) against targets (N, 1), where -1
    is ignored; with grads, `scale` times its gradient overwrites the logits

    It is a module so that it can be compiled like the blocks, which fuses its passes over the logits. If it
    is not, it takes `few` rows at a time, which stay in a CPU's cache.
    """

    def forward(self, logits, targets, scale, V: int, grads: bool, few: int, wide=None):
        if torch.compiler.is_compiling():
            return self.fused(logits, targets, scale, V, grads)
        return sum(self.plain(q, t, scale, V, grads, wide)
                   for q, t in zip(logits.split(few), targets.split(few)))

    def fused(self, logits, targets, scale, V: int, grads: bool):
        valid, t = targets >= 0, targets.clamp(min=0)
        places = torch.arange(logits.size(1), device=logits.device)
        p = torch.where(places < V, logits.float(), -math.inf)
        # a sum, since a compiled gather may read the values written below (torch 2.9 to 2.11)
        at_target = torch.where(places == t, p, 0.0).sum(dim=1, keepdim=True)
        top = p.amax(dim=1, keepdim=True)
        norm = (p - top).exp().sum(dim=1, keepdim=True)
        if grads: # (softmax - one-hot) * scale
            factor = valid * scale
            logits.copy_((p - top).exp() * (factor / norm) - torch.where(places == t, factor, 0.0))
        return ((norm.log() + top - at_target) * valid).sum()

    def plain(self, logits, targets, scale, V: int, grads: bool, wide):
        """ the same, in `wide`, float32 scratch memory for half-precision logits; float32 logits change in
        place """
        valid, t = targets >= 0, targets.clamp(min=0)
        p = logits if wide is None else wide[:len(logits)].copy_(logits)
        p[:, V:] = -math.inf
        at_target, top = p.gather(1, t), p.amax(dim=1, keepdim=True)
        norm = p.sub_(top).exp_().sum(dim=1, keepdim=True)
        if grads:
            factor = valid * scale
            p.mul_(factor / norm).scatter_add_(1, t, -factor.expand_as(top).to(p.dtype))
            logits.copy_(p)
        return ((norm.log() + top - at_target) * valid).sum()

class Head(nn.Linear):
    """ the layer from hidden states x (B, T, C) to logits (B, T, V), for sampling

    GPT-2's logits are near -100, where bfloat16 rounds to halves. So in half precision each row's are less
    its product with `mean`, that of weight's rows: a constant in a row, which a softmax ignores.
    """

    mean = None # (C,), set by `ready` for weights in half precision

    def ready(self) -> None:
        """ to be called before a text, since the weights may have changed """
        self.mean = None if self.weight.dtype == torch.float32 else mean_row(self.weight.detach())

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            if self.mean is None:
                return super().forward(x)
            rows = x.flatten(0, 1)
            logits = torch.addmm(-(rows @ self.mean)[:, None], rows, self.weight.t())
            return logits.unflatten(0, x.shape[:2])

class Lookup(torch.autograd.Function):
    """ the rows idx (B, T) of the tied matrix weight (V, C); their gradient is added to that of the head

    `head_grad` is the list in which ChunkedLoss's backward, which runs first, left the head's gradient.
    This avoids a second V x C matrix, all zeros but for these rows, unless there are more than V of them.
    With `send`, weight may be in RAM, and send(gradient) takes the place of its own gradient.
    """

    @staticmethod
    def forward(ctx, idx, weight, head_grad, send=None):
        ctx.head_grad, ctx.shape, ctx.send = head_grad, weight.shape, send
        ctx.save_for_backward(idx)
        return F.embedding(idx.to(weight.device), weight).to(idx.device)

    @staticmethod
    def backward(ctx, grad):
        idx, = ctx.saved_tensors
        dw = ctx.head_grad.pop() if ctx.head_grad else grad.new_zeros(ctx.shape)
        if idx.numel() > len(dw): # a GPU would add the many gradients of a row one by one
            dw.add_(torch.ops.aten.embedding_dense_backward(grad, idx, len(dw), -1, False))
        elif dw.device.type == 'cpu': # it adds in the same order in every run here, and index_put_ on CUDA
            dw.index_add_(0, idx.flatten(), grad.flatten(0, 1))
        else:
            dw.index_put_((idx,), grad, accumulate=True)
        return None, ctx.send(dw) if ctx.send else dw, None, None

class ChunkedLoss(torch.autograd.Function):
    """ `scale` times the summed cross-entropy of x (N, C) @ weight.t() (C, V) against targets (N,), where -1
    is ignored

    It goes through x a few rows at a time and computes the gradients in the same pass, so that there is never
    an N x V matrix. Matrix products are in autocast's dtype, sums and the softmax in float32. If a list
    `head_grad` is given, weight's gradient is left there for Lookup.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, scale, head_grad=None, cross_entropy=CrossEntropy()):
        device, (N, C), V = x.device.type, x.shape, weight.size(0)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        padded = -(-V // 64) * 64 if device == 'cuda' else V # products of aligned rows are faster
        w = weight
        if weight.dtype != dtype:
            w = torch.empty(padded, C, dtype=dtype, device=x.device)
            w[:V], w[V:] = weight, 0
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x, dtype=dtype) if needs_dx else None
        dw = torch.zeros(V, C, device=x.device) if needs_dw else None
        total = torch.zeros((), device=x.device)
        rows, few = rows_at_once(N, V, dtype.itemsize)
        # all rows share these buffers in turn; room is for few rows, or for one of C in add_product
        logits = torch.empty(rows, padded, dtype=dtype, device=x.device)[:, :len(w)]
        half = dtype != torch.float32
        mean = mean_row(w[:V]) if half else None # see Head
        room = torch.empty(max(few, -(-C // padded)), padded, device=x.device) if half else None
        wide = room[:, :len(w)] if half else None
        with torch.autocast(device, enabled=False):
            for i in range(0, N, rows):
                xi, ti = x[i:i + rows].to(dtype), targets[i:i + rows, None]
                part = logits[:len(xi)]
                if half:
                    part.copy_(-(xi @ mean)[:, None]).addmm_(xi, w.t())
                else:
                    torch.mm(xi, w.t(), out=part)
                total += cross_entropy(part, ti, scale, V, needs_dx or needs_dw, few, wide)
                if needs_dx:
                    torch.mm(part, w, out=dx[i:i + rows])
                if needs_dw:
                    add_product(dw, part[:, :V].t(), xi, room)
        ctx.head_grad = head_grad
        ctx.save_for_backward(dx, dw)
        return total * scale

    @staticmethod
    def backward(ctx, grad):
        dx, dw = (tensor if tensor is None else tensor.mul_(grad) for tensor in ctx.saved_tensors)
        if ctx.head_grad is not None and dw is not None:
            ctx.head_grad.append(dw)
            dw = None
        return dx, dw, None, None, None, None
