"""
How a text is generated token by token: the cache of keys and values, the pass over one more token, which is a
graph on CUDA, and the draw of the next token.

Shapes: B sequences of T tokens, V the vocabulary.
"""
import contextlib
import functools
import math

import torch

class KVCache:
    """ one layer's keys and values of the tokens seen so far, with room for `length` of them """
    mask = None # a token sees all cached ones

    def __init__(self, length: int):
        self.length, self.size, self.k, self.v = length, 0, None, None

    def positions(self, T: int, device):
        """ the positions of the next T tokens """
        return torch.arange(self.size, self.size + T, device=device)

    def append(self, k, v):
        """ add k and v (B, n_head, T, head_size) of T more tokens, and return those of all tokens so far """
        B, n_head, T, head_size = k.shape
        assert self.size == 0 or T == 1, "the prompt goes in whole, what follows a token at a time"
        if self.k is None: # a CUDA graph holds on to them, so they stay when the window restarts
            self.k, self.v = k.new_zeros(2, B, n_head, self.length, head_size)
        start, self.size = self.size, self.size + T
        self.k[:, :, start:self.size], self.v[:, :, start:self.size] = k, v
        return self.k[:, :, :self.size], self.v[:, :, :self.size]

class FixedCache:
    """ a KVCache's keys and values, for a pass over one token that changes neither shapes nor addresses

    at, a tensor (1,), is the token's position; mask (1, length) is -inf for later positions, else 0.
    """

    def __init__(self, cache: KVCache, at, mask):
        self.k, self.v, self.at, self.mask = cache.k, cache.v, at, mask

    def positions(self, T: int, device):
        return self.at

    def append(self, k, v):
        return self.k.index_copy_(2, self.at, k), self.v.index_copy_(2, self.at, v)

@functools.cache
def warm_up_stream(device):
    """ the same stream each time, since CUDA's libraries keep memory for each that they are used on """
    return torch.cuda.Stream(device)

class FixedStep:
    """ a model's pass over one more token of each sequence, in tensors whose addresses never change

    On CUDA it is therefore recorded once, as a graph that launches all its kernels at once; without a graph a
    fast GPU waits for Python between kernels.
    """

    def __init__(self, model, cache: list[KVCache], token):
        self.model, self.cache, self.graph = model, cache, None
        self.fed, self.at = torch.zeros_like(token[:, None]), torch.zeros_like(token[:1])
        if token.is_cuda:
            self.record(cache[0].size)

    def record(self, size):
        with torch.cuda.device(self.fed.device):
            self.at.fill_(size) # the first real pass overwrites what is written there
            aside = warm_up_stream(self.fed.device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside): # warm-up: libraries initialize in the first passes
                for _ in range(2):
                    self.run()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=aside):
                self.logits = self.run()

    def run(self):
        places = torch.arange(self.cache[0].length, device=self.at.device)[None]
        mask = torch.zeros_like(places, dtype=self.cache[0].k.dtype).masked_fill(places > self.at, -math.inf)
        return self.model(self.fed, cache=[FixedCache(layer, self.at, mask) for layer in self.cache])[0]

    def __call__(self, token):
        """ the logits (B, 1, vocab_size) after these tokens (B,), overwritten by the next call """
        self.fed.copy_(token[:, None])
        self.at.fill_(self.cache[0].size)
        for layer in self.cache:
            layer.size += 1
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.logits

def one_row(token, dtype):
    """ a context for the pass over tokens (B,), which turns oneDNN off for a single row in bfloat16 on a CPU:
    it is faster than torch's own products for more rows, but slower for one """
    if token.numel() == 1 and token.device.type == 'cpu' and dtype == torch.bfloat16:
        return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    return contextlib.nullcontext()

def penalize(logits, seen, penalty: float):
    """ logits (B, V) in which those of the tokens `seen` (B, T) are divided by `penalty`, or multiplied where
    they are negative: https://arxiv.org/abs/1909.05858, section 4.1, as transformers does it """
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))

def sample_token(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """ a token (B,) for each row of logits (B, V): the likeliest at temperature 0, else drawn from the
    top_k likeliest (0 for all) and, of these, from the fewest that together have probability top_p

    It draws the same tokens as torch.multinomial, but gives -1 where logits are not finite, and on CUDA
    neither waits nor fails.
    """
    if temperature < 1e-6: # 0, or so close that dividing by it overflows
        return logits.argmax(dim=-1).masked_fill(~logits.amax(dim=-1).isfinite(), -1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p # the tokens before it suffice; the first stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    probs = logits.softmax(dim=-1)
    token = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)
    return token.masked_fill(probs[:, 0].isnan(), -1)
