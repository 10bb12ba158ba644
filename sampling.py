"""
What continues a text token by token: the keys and values of the tokens so far, the pass over one more, as a
graph on CUDA, and the draw of the next.

Shapes: B sequences of T tokens, V the vocabulary.
"""
import contextlib
import math

import torch

class KVCache:
    """ one layer's keys and values of the tokens seen so far, with room for `length` of them """
    mask = None # a token sees all of them

    def __init__(self, length: int):
        self.length, self.size, self.k, self.v = length, 0, None, None

    def positions(self, T: int, device):
        """ those of the next T tokens """
        return torch.arange(self.size, self.size + T, device=device)

    def append(self, k, v):
        """ take in those of T more tokens, (B, n_head, T, head_size), and return those of all """
        B, n_head, T, head_size = k.shape
        assert self.size == 0 or T == 1, "the prompt goes in whole, what follows a token at a time"
        if self.k is None: # a graph holds on to them, so they stay when a window restarts
            self.k, self.v = k.new_zeros(2, B, n_head, self.length, head_size)
        start, self.size = self.size, self.size + T
        self.k[:, :, start:self.size], self.v[:, :, start:self.size] = k, v
        return self.k[:, :, :self.size], self.v[:, :, :self.size]

class FixedCache:
    """ a KVCache's keys and values for a pass over one token that changes neither shapes nor addresses

    at (1,), a tensor, is the token's position; mask (1, length) is -inf for later ones and 0 for the others.
    """

    def __init__(self, cache: KVCache, at, mask):
        self.k, self.v, self.at, self.mask = cache.k, cache.v, at, mask

    def positions(self, T: int, device):
        return self.at

    def append(self, k, v):
        return self.k.index_copy_(2, self.at, k), self.v.index_copy_(2, self.at, v)

class FixedStep:
    """ a model's pass over one more token of each sequence, all in tensors that stay where they are

    So on CUDA it is recorded once, as a graph that starts all its kernels at once; without one a fast GPU
    waits for Python between them.
    """

    def __init__(self, model, cache: list[KVCache], token):
        self.model, self.cache, self.graph = model, cache, None
        self.fed, self.at = torch.zeros_like(token[:, None]), torch.zeros_like(token[:1])
        if token.is_cuda:
            self.record(cache[0].size)

    def record(self, size):
        with torch.cuda.device(self.fed.device):
            self.at.fill_(size) # what is written there is written again
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside): # the libraries set themselves up in the first passes
                for _ in range(2):
                    self.run()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.run()

    def run(self):
        places = torch.arange(self.cache[0].length, device=self.at.device)[None]
        mask = torch.zeros_like(places, dtype=self.cache[0].k.dtype).masked_fill(places > self.at, -math.inf)
        return self.model(self.fed, cache=[FixedCache(layer, self.at, mask) for layer in self.cache])[0]

    def __call__(self, token):
        """ (B, 1, vocab_size), overwritten by the next call """
        self.fed.copy_(token[:, None])
        self.at.fill_(self.cache[0].size)
        for layer in self.cache:
            layer.size += 1
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.logits

def one_row(token, dtype):
    """ a context for the pass over tokens (B,), in which torch multiplies matrices by one row in bfloat16
    itself on a CPU: oneDNN, which is faster for more rows, takes longer for one """
    if token.numel() == 1 and token.device.type == 'cpu' and dtype == torch.bfloat16:
        return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    return contextlib.nullcontext()

def sample_token(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """ a token (B,) for each row of logits (B, V): the likeliest at temperature 0, else drawn from the
    top_k likeliest and, of these, from the fewest that hold the probability top_p; None is no limit

    The draw is torch.multinomial's, to the token; but where logits are not finite it gives -1, and on CUDA
    nothing waits or fails.
    """
    if temperature < 1e-6: # 0, or so near that it overflows
        return logits.argmax(dim=-1).masked_fill(~logits.amax(dim=-1).isfinite(), -1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p # what stands before it is enough; the first stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    probs = logits.softmax(dim=-1)
    token = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)
    return token.masked_fill(probs[:, 0].isnan(), -1)
